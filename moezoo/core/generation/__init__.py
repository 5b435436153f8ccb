"""Generation: settings of a checkpoint, prompt batches, and the decoding loop."""
