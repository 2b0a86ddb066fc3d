"""The only package that imports MLflow: runs, metrics, model versions and their lineage.

Importing this package does not import mlflow, which takes seconds.
"""

from pipelines.registry.aliases import AliasHistory, AliasMoved, Decision, Move, check_alias, check_why
from pipelines.registry.inventory import AliasMoves, RegistryCounts
from pipelines.registry.model_files import ModelFiles, is_registered, read_model
from pipelines.registry.models import register_backbone, register_classifier
from pipelines.registry.outages import TrackingUnreachable
from pipelines.registry.points import Point
from pipelines.registry.provenance import PROVENANCE, Provenance
from pipelines.registry.pruning import Garbage, Inventory
from pipelines.registry.runs import Kind, Run
from pipelines.registry.thresholds import Threshold, unmet
from pipelines.registry.tracking import Tracking, check_run_name, open_tracking, read_registry, refuse_local_tracking
from pipelines.registry.versions import LICENCE_TAG, ORIGIN_TAG, ModelRef, Step, model_uri, sha256_of

__all__ = [
    "LICENCE_TAG",
    "ORIGIN_TAG",
    "PROVENANCE",
    "AliasHistory",
    "AliasMoved",
    "AliasMoves",
    "Decision",
    "Garbage",
    "Inventory",
    "Kind",
    "ModelFiles",
    "ModelRef",
    "Move",
    "Point",
    "Provenance",
    "RegistryCounts",
    "Run",
    "Step",
    "Threshold",
    "Tracking",
    "TrackingUnreachable",
    "check_alias",
    "check_run_name",
    "check_why",
    "is_registered",
    "model_uri",
    "open_tracking",
    "read_model",
    "read_registry",
    "refuse_local_tracking",
    "register_backbone",
    "register_classifier",
    "sha256_of",
    "unmet",
]
