"""Options of every command, as frozen dataclasses that validate their values. Imports mae_core.config only."""

from pipelines.config.data import DataConfig, EncodeConfig, PrepareConfig, SourceConfig
from pipelines.config.embedding import CurateConfig, EmbedConfig, NeighboursConfig, PredictConfig
from pipelines.config.evaluating import EvaluateConfig, LookConfig, PeriodicEvaluationConfig, SegmentConfig
from pipelines.config.handing_over import HandoffConfig, HandoffJob, HandoffPlan, JobsConfig, SubmitConfig
from pipelines.config.monitoring import ExporterConfig
from pipelines.config.progressive import ProgressiveConfig
from pipelines.config.promoting import GateConfig, LineageConfig, PromoteConfig, PruneConfig, RollbackConfig
from pipelines.config.reading import (
    KINDS,
    PRESETS,
    config_hash,
    dotted_fields,
    from_dict,
    identity,
    load_preset,
    options_for,
    preset_fields,
    run_name,
    to_dict,
    with_overrides,
    without_added_defaults,
)
from pipelines.config.running import CheckpointConfig, ComputeConfig, FixedCompute, Precision, TrackingConfig
from pipelines.config.sweeping import SCRATCH, SweepConfig, parse_space
from pipelines.config.training import PROBE, ClassifyConfig, PretrainConfig
from pipelines.config.view import (
    DemoConfig,
    ExportConfig,
    ImportConfig,
    InspectConfig,
    ReconstructConfig,
    RegisterConfig,
    RunsConfig,
)

__all__ = [
    "KINDS",
    "PRESETS",
    "PROBE",
    "SCRATCH",
    "CheckpointConfig",
    "ClassifyConfig",
    "ComputeConfig",
    "CurateConfig",
    "DataConfig",
    "DemoConfig",
    "EmbedConfig",
    "EncodeConfig",
    "EvaluateConfig",
    "ExportConfig",
    "ExporterConfig",
    "FixedCompute",
    "GateConfig",
    "HandoffConfig",
    "HandoffJob",
    "HandoffPlan",
    "ImportConfig",
    "InspectConfig",
    "JobsConfig",
    "LineageConfig",
    "LookConfig",
    "NeighboursConfig",
    "PeriodicEvaluationConfig",
    "Precision",
    "PredictConfig",
    "PrepareConfig",
    "PretrainConfig",
    "ProgressiveConfig",
    "PromoteConfig",
    "PruneConfig",
    "ReconstructConfig",
    "RegisterConfig",
    "RollbackConfig",
    "RunsConfig",
    "SegmentConfig",
    "SourceConfig",
    "SubmitConfig",
    "SweepConfig",
    "TrackingConfig",
    "config_hash",
    "dotted_fields",
    "from_dict",
    "identity",
    "load_preset",
    "options_for",
    "parse_space",
    "preset_fields",
    "run_name",
    "to_dict",
    "with_overrides",
    "without_added_defaults",
]
