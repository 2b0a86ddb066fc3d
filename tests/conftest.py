"""Shapes in signatures are enforced while tests run, and no test touches the user's MLflow or Ray."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("MLFLOW_TRACKING_URI", None)

from jaxtyping import install_import_hook

# Installed before anything imports mae_core; it stays installed, since modules load as tests need them.
install_import_hook("mae_core", "beartype.beartype")
