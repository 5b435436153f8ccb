"""Models of moezoo in EleutherAI's lm-evaluation-harness (`lm_eval`), an extra: `lm_eval --model moezoo`."""
