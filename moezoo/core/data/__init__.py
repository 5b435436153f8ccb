"""Training data: sources, tokenizers, token files, sample order and batches."""
