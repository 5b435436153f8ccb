"""Data: sources, tokenizers, token files, and the order in which windows are drawn."""
