"""Adapter folders of mlx-lm, PEFT and vLLM: read into factors of our matrices, and written from them."""
