"""Commands that train: claim a run folder, launch the worker group, publish the result."""
