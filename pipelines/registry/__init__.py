"""The only package that imports MLflow: runs, metrics, model versions and their lineage.

Importing this package does not import mlflow, which takes seconds.
"""

from pipelines.registry.model_files import ModelFiles, is_registered, read_model
from pipelines.registry.models import register_backbone, register_classifier
from pipelines.registry.outages import TrackingUnreachable
from pipelines.registry.points import Point
from pipelines.registry.provenance import PROVENANCE, Provenance
from pipelines.registry.runs import Kind, Run
from pipelines.registry.tracking import Tracking, check_run_name, open_tracking, refuse_local_tracking
from pipelines.registry.versions import LICENCE_TAG, ORIGIN_TAG, ModelRef, Step, sha256_of

__all__ = [
    "LICENCE_TAG",
    "ORIGIN_TAG",
    "PROVENANCE",
    "Kind",
    "ModelFiles",
    "ModelRef",
    "Point",
    "Provenance",
    "Run",
    "Step",
    "Tracking",
    "TrackingUnreachable",
    "check_run_name",
    "is_registered",
    "open_tracking",
    "read_model",
    "refuse_local_tracking",
    "register_backbone",
    "register_classifier",
    "sha256_of",
]
