"""Run folders: jobs, checkpoints, metrics and state of a run, and their delivery to MLflow."""
