"""Inverse of the families' `config.json -> ModelSpec`: the fields of a config.json for a model designed here.

candidates families that may compute a model: a cheap test before the search
reads     Fields that record what a family reads from a config.json, and of which kind each field is
leaves    a ModelSpec as values by path, and the differences of two of them
rotations RoPE as fields of a config.json
maps      how a value of the spec follows from a field, and the inverse
solve     search for the fields from which a family reads a given spec
"""
