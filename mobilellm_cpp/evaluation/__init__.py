"""Zero-shot tasks of the lm-evaluation-harness on model files (the extra `eval`)."""
