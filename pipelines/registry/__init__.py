"""The only package that imports MLflow: runs, metrics, model versions and their lineage.

Importing this package does not import mlflow, which takes seconds.
"""

from pipelines.registry.models import register_backbone, register_classifier
from pipelines.registry.outages import TrackingUnreachable
from pipelines.registry.points import Point
from pipelines.registry.runs import Kind, Run
from pipelines.registry.tracking import Tracking, check_run_name, open_tracking, refuse_local_tracking
from pipelines.registry.versions import LICENCE_TAG, ORIGIN_TAG, ModelRef, Step

__all__ = [
    "LICENCE_TAG",
    "ORIGIN_TAG",
    "Kind",
    "ModelRef",
    "Point",
    "Run",
    "Step",
    "Tracking",
    "TrackingUnreachable",
    "check_run_name",
    "open_tracking",
    "refuse_local_tracking",
    "register_backbone",
    "register_classifier",
]
