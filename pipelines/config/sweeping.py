"""Options of a sweep."""

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro
import yaml

from mae_core.config import ADDED, AugmentConfig, ClassifierConfig, OptimConfig
from mae_core.errors import UserError
from pipelines.config.data import DataConfig
from pipelines.config.training import PROBE, ClassifyConfig, PretrainConfig

SCRATCH = ClassifyConfig(
    epochs=200,
    data=DataConfig(),
    classifier=ClassifierConfig(drop_path=0.2, ema_decay=0.9999),
    optim=OptimConfig(base_lr=1e-4, warmup_epochs=20.0, weight_decay=0.3),
    augment=AugmentConfig(
        scale=(0.08, 1.0), rand_augment="rand-m9-mstd0.5", mixup=0.8, cutmix=1.0, label_smoothing=0.1
    ),
)
"""Training from scratch as in Table 11, the baseline of a sweep."""


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
    """Folder or s3:// prefix for the ledger, the table, the report, the figures and the best preset."""
    question: str = field(default="", metadata=ADDED)
    """What the sweep is to answer, for its report; if empty, named after the fields of the space."""
    space: Annotated[dict[str, list[Any]], _SPACE_FLAG] = field(
        default_factory=lambda: {"model.mask.ratio": [0.5, 0.75, 0.9], "model.decoder_depth": [1, 4]}
    )
    """Dotted fields, each with the values to try: of `pretrain`, such as model.mask.ratio=0.5,0.75, or of `finetune`
    and `probe`, such as finetune.labels=1%,10%. Points that pretrain alike share one pretraining."""
    seeds: int = field(default=1, metadata=ADDED)
    """Seeds per point: its trials add 0, 1, ... to the seeds of pretrain, probe and finetune. Every point runs with the
    first seed before any runs with the second. More seeds continue a finished sweep."""
    baselines: bool = field(default=False, metadata=ADDED)
    """Also train from scratch on the same labels, as `scratch` says, and probe a random encoder, once per seed."""
    budget_hours: float | None = field(default=None, metadata=ADDED)
    """Hours after which the sweep ends with the trials that are finished; a trial that would probably exceed them is
    not started. A larger budget continues the sweep. Without a value there is no limit."""
    search: Literal["grid", "random", "tpe"] = "grid"
    """grid: try every combination; random: draw num_trials of them without repetition; tpe: let Optuna's sampler choose
    num_trials of them by what earlier ones reached (extra `search`)."""
    num_trials: int = 8
    """Points of a random search or of tpe."""
    round_points: int = field(default=4, metadata=ADDED)
    """Points that tpe chooses at a time, before it sees what they reach."""
    seed: int = 0
    """Seed of a random search or of tpe."""
    early_stop: Literal["none", "asha"] = field(default="none", metadata=ADDED)
    """asha: end pretrainings whose online probe (pretrain.evaluate) is among the worst at an epoch, by Ray Tune's ASHA;
    points that it ends with the first seed run with no other. none: run every trial to its end."""
    asha_factor: int = field(default=3, metadata=ADDED)
    """With asha, one trial in this many goes on at each rung. The first rung is the first evaluation, the next ones
    each have this many times the epochs."""
    max_concurrent: int = 1
    """Worker groups that run concurrently."""
    trials_per_group: int = 1
    """Trials that one worker group runs one after the other; more save start-up time if trials take only seconds."""
    select_by: Literal["finetune", "probe"] = "finetune"
    """Accuracy on val by which the best trial is selected."""
    read_test: bool = field(default=True, metadata=ADDED)
    """Evaluate the best point and its baseline on the test split, if there is one. false: leave test unread, as while
    more sweeps are to come; the same command with true only adds the evaluation."""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """Pretraining of every trial, before the values of the search space are applied."""
    probe: ClassifyConfig = field(default_factory=lambda: PROBE)
    """Linear probe of every trial; data.uri, backbone and compute are set by the trial."""
    finetune: ClassifyConfig = field(default_factory=ClassifyConfig)
    """Fine-tuning of every trial; data.uri, backbone and compute are set by the trial."""
    scratch: ClassifyConfig = field(default_factory=lambda: SCRATCH, metadata=ADDED)
    """Training from scratch for `baselines`; the labels are those of `finetune`, the rest is set by the trial."""

    def __post_init__(self) -> None:
        if not self.space or not all(isinstance(v, list) and v for v in self.space.values()):
            raise UserError(
                "space must name at least one field with a list of values; try model.mask.ratio: [0.5, 0.75]"
            )
        methods = self.probe.classifier.method, self.finetune.classifier.method, self.scratch.classifier.method
        if methods != ("probe", "finetune", "finetune"):
            raise UserError(
                f"classifier.method of probe, finetune and scratch are {', '.join(methods)}; they must be probe, "
                "finetune and finetune"
            )
        if self.pretrain.extend:
            raise UserError(
                f"pretrain.extend {self.pretrain.extend!r} is for `mae pretrain`: trials start anew; leave it out"
            )
        self.pretrain.data.refuse_cache("a sweep")
        self._check_early_stop()
        if self.seeds < 1:
            raise UserError(f"seeds {self.seeds} is below 1; try 3")
        if self.seeds > 1 and (varied := {"seed", "probe.seed", "finetune.seed"} & self.space.keys()):
            raise UserError(f"seeds {self.seeds} and {min(varied)} in the space exclude each other; leave one out")
        if self.budget_hours is not None and not 0 < self.budget_hours < math.inf:
            raise UserError(f"budget_hours {self.budget_hours:g} is not positive; try 8, or leave it out for no limit")
        if min(self.num_trials, self.round_points, self.max_concurrent, self.trials_per_group) < 1:
            raise UserError(
                "num_trials, round_points, max_concurrent and trials_per_group must be at least 1; try 8, 4, 1 and 1"
            )

    def _check_early_stop(self) -> None:
        if self.early_stop == "none":
            return
        every, epochs = self.pretrain.evaluate.every_epochs, self.pretrain.epochs
        if not 0 < every < epochs:
            raise UserError(
                f"early_stop asha needs evaluations before the end, but pretrain.evaluate.every_epochs is {every} of "
                f"{epochs} epochs; try --pretrain.evaluate.every-epochs {max(1, epochs // 9)}"
            )
        if self.asha_factor < 2:
            raise UserError(f"asha_factor {self.asha_factor} is below 2; try 3")
        if self.search == "tpe":
            raise UserError("early_stop asha and search tpe exclude each other; try --search random")
        if "epochs" in self.space:
            raise UserError("early_stop asha compares trials of equally many epochs; leave epochs out of the space")
        if self.trials_per_group > 1:
            raise UserError(
                f"early_stop asha ends a worker group, but trials_per_group is {self.trials_per_group}; try 1"
            )
