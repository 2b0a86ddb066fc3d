"""Hand model versions over to fine-tuning jobs, each exactly once, and record what was started."""
