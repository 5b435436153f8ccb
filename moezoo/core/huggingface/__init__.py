"""Checkpoints of Hugging Face families, in and out: no tensor code of a framework, one small file a family.

families/    what a family's config.json says, and where its tensors go: data
fields       config.json, every field of which is understood, known to be harmless, or refused
parts        what several families spell alike: rotations, attention, experts
tensors      the language of the name tables: theirs <-> ours, with stack, split, interleave, transpose as data
folder       the files, checked before a byte is believed
quantization codes and scales <-> numbers (FP8 blocks, MXFP4)
ledger       every tensor of the files is mapped, kept verbatim, or refused
checkpoint   config + ledger + files = a spec and its weights, read one by one
export       back into files of the same layout
hub          repositories by id
"""
