"""The driver of fine-tuning: a registered backbone, or none, becomes a registered classifier."""

from typing import Any

from pipelines import registry
from pipelines.config import ClassifyConfig, run_name
from pipelines.drivers.classify import classify_task, frozen, start_of, with_labelled_dataset
from pipelines.drivers.drive import drive


def finetune(config: ClassifyConfig, preset: str, *, fresh: bool = False) -> dict[str, Any]:
    """The run's outcome: top-1 on the split asked for, and the classifier's version.

    The backbone's alias is resolved first and the version frozen, so a new champion means a new run. Raises UserError
    for what the user can mend, before anything is written.
    """
    config, manifest = with_labelled_dataset(config)
    tracking = registry.open_tracking(config.tracking.experiment)
    config, ref = frozen(config, tracking)
    start = start_of(config, ref, tracking, manifest)
    task = classify_task(config, run_name(config, preset, manifest.digest), start, manifest)
    return drive([task], task.name, tracking, fresh=fresh)[0]
