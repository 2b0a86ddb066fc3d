"""Commands that train: claim a run's folder, launch its worker group, publish the result."""
