"""Training: the loop, evaluation, metrics, and what a run reports."""
