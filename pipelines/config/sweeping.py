"""Options of a sweep."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro
import yaml

from mae_core.errors import UserError
from pipelines.config.training import PROBE, ClassifyConfig, PretrainConfig


def parse_space(words: list[str]) -> dict[str, list[Any]]:
    """Parse words such as `model.mask.ratio=0.5,0.75` into a search space; values are YAML. Raises UserError."""
    space = {}
    for word in words:
        dotted, equals, values = word.partition("=")
        if not equals or not values:
            raise UserError(f"space {word!r} is not FIELD=V1,V2; try model.mask.ratio=0.5,0.75")
        try:
            space[dotted] = yaml.safe_load(f"[{values}]")
        except yaml.YAMLError:
            raise UserError(f"{values!r} for {dotted} is not a list of values; try model.mask.ratio=0.5,0.75") from None
    return space


_SPACE_FLAG = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="FIELD=V1,V2 ...",
    instance_from_str=parse_space,
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda space: [f"{k}={','.join(map(str, v))}" for k, v in space.items()],
)


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A search whose trials pretrain, probe and fine-tune; the best on val is registered."""

    name: str = ""
    """Name of the sweep; if empty, the preset's name and a hash of the config."""
    output: str = "runs"
    """Folder or s3:// prefix for the ledger, the table, the figure and the best preset."""
    space: Annotated[dict[str, list[Any]], _SPACE_FLAG] = field(
        default_factory=lambda: {"model.mask.ratio": [0.5, 0.75, 0.9], "model.decoder_depth": [1, 4]}
    )
    """Dotted fields of `pretrain`, each with the values to try, such as model.mask.ratio=0.5,0.75."""
    search: Literal["grid", "random"] = "grid"
    """grid: try every combination; random: draw num_trials of them without repetition."""
    num_trials: int = 8
    """Trials of a random search."""
    seed: int = 0
    """Seed of a random search."""
    max_concurrent: int = 1
    """Worker groups that run concurrently."""
    trials_per_group: int = 1
    """Trials that one worker group runs one after the other; more save start-up time if trials take only seconds."""
    select_by: Literal["finetune", "probe"] = "finetune"
    """Accuracy on val by which the best trial is selected."""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """Pretraining of every trial, before the values of the search space are applied."""
    probe: ClassifyConfig = field(default_factory=lambda: PROBE)
    """Linear probe of every trial; data.uri, backbone and compute are set by the trial."""
    finetune: ClassifyConfig = field(default_factory=ClassifyConfig)
    """Fine-tuning of every trial; data.uri, backbone and compute are set by the trial."""

    def __post_init__(self) -> None:
        if not self.space or not all(isinstance(v, list) and v for v in self.space.values()):
            raise UserError(
                "space must name at least one field with a list of values; try model.mask.ratio: [0.5, 0.75]"
            )
        if self.probe.classifier.method != "probe" or self.finetune.classifier.method != "finetune":
            raise UserError("probe.classifier.method must be probe and finetune.classifier.method finetune")
        if self.pretrain.extend:
            raise UserError(
                f"pretrain.extend {self.pretrain.extend!r} is for `mae pretrain`: trials start anew; leave it out"
            )
        if min(self.num_trials, self.max_concurrent, self.trials_per_group) < 1:
            raise UserError("num_trials, max_concurrent and trials_per_group must be at least 1; try 8, 1 and 1")
