"""Generation: sampling settings, prompt batches, and the decoding loop."""
