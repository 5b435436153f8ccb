"""Load and export Hugging Face checkpoints, independently of the backends; one small file per model family.

families/    per family: how to parse its config.json, and its tensor mapping, as data
fields       config.json, every field of which is parsed, known to be harmless, or rejected
parts        config fields and tensor names shared by several families: RoPE, attention, experts
tensors      rules of the tensor mapping: theirs <-> ours, with stack, split, interleave, transpose as data
folder       safetensors files of a checkpoint folder, validated before any tensor is read
codecs       encode and decode quantized tensors (FP8 blocks, MXFP4)
ledger       account of all tensors: each is mapped, kept verbatim, or rejected
checkpoint   config + ledger + files = a spec and its weights, loaded lazily one by one
export       write weights back into files of the same layout
export_as    write a model designed in moezoo as a family with the same computation
hub          download repositories by id
"""
