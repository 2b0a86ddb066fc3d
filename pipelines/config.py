"""Every dict (YAML, sweep point, checkpoint metadata, train_loop_config) becomes an object here, or is refused."""

import dataclasses
import difflib
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
import yaml
from pydantic import TypeAdapter, ValidationError

from mae_core.config import AugmentConfig, ClassifierConfig, ModelConfig, OptimConfig, parse_arch

PRESETS = Path(__file__).parent / "presets"


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """What is stored of an image."""

    kind: Literal["restarts", "keep", "shrink"] = "restarts"
    """restarts: a JPEG gets restart markers, without a change of any pixel, so that training decodes only the part
    under a crop; keep: the original bytes; shrink: a larger image becomes a JPEG of short_side_px at `quality`."""
    short_side_px: int = 320
    """Short side of what shrink stores; images that are no larger are stored as with restarts."""
    quality: int = 92
    """JPEG quality of what shrink stores."""

    def __post_init__(self) -> None:
        if self.short_side_px < 1:
            raise ValueError(f"short_side_px {self.short_side_px} is below 1; try 320")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality {self.quality} is outside 1 to 100; try 92")


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """How images become shards and a manifest."""

    val_fraction: float = 0.1
    """Share of images held out as split `val`, by a hash of their content, where the source has no val/ folder."""
    labels: Literal["auto", "folder", "none"] = "auto"
    """folder: the first folder below a split is the class; auto: so where every image lies just one folder deep."""
    rows_per_shard: int = 8192
    """Images of the sorted listing that go to one shard at most; a split's shards are of even size."""
    shard_bytes: int = 2**30
    """Bytes of images, as the source has them, that go to one shard at most."""
    rows_per_group: int = 256
    """Rows of a Parquet row group, the unit of shuffling and reading."""
    max_pixels: int = 64_000_000
    """Images of more pixels are quarantined, by their header, before they are decoded."""
    drop_duplicates: bool = True
    """Keep images of equal content once (in test, else val, else train); otherwise they are counted and stay."""
    max_bad: float = 0.01
    """Share of images that may be in quarantine; more end the job."""
    seed: int = 0
    """Seed of the hash that holds out `val`."""
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    """What is stored of an image."""

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad <= 1:
            raise ValueError(f"max_bad {self.max_bad} is outside [0, 1]; try 0.01, or 1 to allow any number")
        if self.shard_bytes < 1:
            raise ValueError(f"shard_bytes {self.shard_bytes} is below 1; try {2**30}")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction {self.val_fraction} is outside [0, 1); try 0.1, or 0 for none")
        if self.rows_per_group < 1 or self.rows_per_shard < self.rows_per_group:
            raise ValueError(
                f"rows_per_shard {self.rows_per_shard} must be at least rows_per_group {self.rows_per_group}, "
                "and that at least 1; try 8192 and 256"
            )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which prepared dataset is read, and how."""

    uri: str = ""
    """Prepared dataset: the folder or s3:// prefix that `mae prepare` wrote."""
    batch: int = 4096
    """Global batch: samples of one optimizer step over all workers."""
    micro_batch: int = 64
    """Samples of one forward pass on one worker; must divide the batch. Gradients accumulate over the rest."""
    window: int = 8192
    """Rows are shuffled within windows of this many, rounded to whole batches, of shuffled row groups."""
    labels_per_class: int | None = None
    """Train on so many labelled images of each class, chosen by the seed; without a value on all."""

    def __post_init__(self) -> None:
        if self.micro_batch < 1 or self.batch < 1 or self.batch % self.micro_batch:
            raise ValueError(
                f"batch {self.batch} is not a multiple of micro_batch {self.micro_batch}; "
                f"try {max(1, round(self.batch / max(1, self.micro_batch))) * max(1, self.micro_batch)}"
            )
        if self.window < 1:
            raise ValueError(f"window {self.window} is below 1; try 8192")
        if self.labels_per_class is not None and self.labels_per_class < 1:
            raise ValueError(f"labels_per_class {self.labels_per_class} is below 1; try 100")


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Where the work runs."""

    num_workers: int = 1
    """DDP workers, one GPU each where GPUs are used."""
    min_workers: int | None = None
    """Start, and go on, with as few workers as this where no more are to be had, and take more when they come; a
    change of their number starts the group again from the newest checkpoint. Without a value exactly num_workers."""
    gpu: bool = False
    """Give each worker a GPU and use NCCL; otherwise CPU and gloo."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Autocast type of the forward pass; bfloat16 on GPUs that have it."""
    compile: bool = False
    """Compile the model with torch.compile."""
    deterministic: bool = False
    """Only deterministic CUDA kernels, so that a resumed run equals an undisturbed one bit for bit on GPUs too."""
    threads: int = 1
    """CPU threads of one worker."""
    data_tasks: int = 2
    """Tasks that decode at the same time where Ray is embedded in this process; a cluster uses all free CPUs."""
    spread: bool = False
    """Spread workers over nodes instead of filling one node after another."""
    max_failures: int = 3
    """Worker failures after which a run ends with an error."""
    stall_s: float = 600.0
    """Seconds after which a worker that does not answer, or does not join a collective, counts as failed."""
    on_nan: Literal["stop", "skip", "roll_back"] = "stop"
    """What a gradient that is not finite leads to, beside the sample ids in the log: an end of the run; a step without
    an update; or a return to the newest checkpoint, from which the steps up to the bad one are left out."""

    def __post_init__(self) -> None:
        for name in ("num_workers", "threads", "data_tasks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is below 1; try 1")
        if self.min_workers is not None and not 1 <= self.min_workers <= self.num_workers:
            raise ValueError(
                f"min_workers {self.min_workers} is not between 1 and num_workers {self.num_workers}; try 1"
            )
        if self.stall_s <= 0:
            raise ValueError(f"stall_s {self.stall_s:g} is not positive; try 600")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """What MLflow is told. The server is chosen by MLFLOW_TRACKING_URI; without it a local sqlite file is used."""

    experiment: str = "mae"
    """MLflow experiment of the run."""
    register: bool = True
    """Register the result as a new model version, with alias @candidate."""
    name: str = ""
    """Registered model; empty for mae-<arch>, or <backbone>-classifier."""
    log_every_steps: int = 10
    """Steps between two points of every metric."""
    pictures_every_epochs: int = 10
    """Epochs between two pictures of reconstructions."""

    def __post_init__(self) -> None:
        _check_model_name(self.name)
        for name in ("log_every_steps", "pictures_every_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is below 1; try 10")


def _check_model_name(name: str) -> None:
    if set(name) & set("/:"):
        raise ValueError(f"name {name!r} of a registered model holds / or :, which MLflow refuses; try -")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When training state is saved."""

    every_epochs: float = 1.0
    """Epochs between two checkpoints; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    keep_best: int = 0
    """Checkpoints of the lowest training loss that are kept too."""
    keep_every_epochs: int | None = None
    """Checkpoints of every so many epochs are kept too, for good; without a value none."""
    patience_s: float = 300.0
    """How long a checkpoint that the storage refuses is tried again, while training goes on, before the run fails."""

    def __post_init__(self) -> None:
        if not 0 < self.every_epochs < math.inf or self.keep < 1:
            raise ValueError("every_epochs must be positive and keep at least 1; try 1 and 2")
        if self.keep_best < 0 or self.patience_s < 0:
            raise ValueError("keep_best and patience_s must be at least 0; try 0 and 300")
        if self.keep_every_epochs is not None and self.keep_every_epochs < 1:
            raise ValueError(f"keep_every_epochs {self.keep_every_epochs} is below 1; try 100, or leave it out")


def _check_epochs(epochs: int, optim: OptimConfig) -> None:
    if epochs < 1:
        raise ValueError(f"epochs {epochs} is below 1; try 1")
    if optim.warmup_epochs > epochs:
        raise ValueError(
            f"optim.warmup_epochs {optim.warmup_epochs:g} exceeds epochs {epochs}; try {max(0, epochs // 10)}"
        )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Masked-autoencoder pretraining (Table 8)."""

    name: str = ""
    """Name of the run; empty for the preset's name and a hash of the config."""
    output: str = "runs"
    """Folder or s3:// prefix under which runs keep checkpoints and metrics."""
    seed: int = 0
    """Seed of initial weights, order, crops and masks."""
    epochs: int = 800
    """Passes over the training split."""
    masks_per_image: int = 1
    """Masks that a step learns from for each decoded image; every count stays one of masked images (`reading`)."""
    data: DataConfig = field(default_factory=DataConfig)
    """Dataset and batch."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Model, mask and target."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and schedule."""
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    """Augmentation; the paper's is a random resized crop and a flip, nothing else."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    """Workers and precision."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""

    def __post_init__(self) -> None:
        _check_epochs(self.epochs, self.optim)
        for name in ("rand_augment", "erase", "mixup", "cutmix", "label_smoothing"):
            if getattr(self.augment, name):
                raise ValueError(f"augment.{name} is for classifiers; pretraining has no labels: leave it out")
        if self.masks_per_image < 1:
            raise ValueError(f"masks_per_image {self.masks_per_image} is below 1; try 4, or 1 for the paper's")
        for name, count in (("epochs", self.epochs), ("data.micro_batch", self.data.micro_batch)):
            if count % self.masks_per_image:
                raise ValueError(
                    f"{name} {count} is not a multiple of masks_per_image {self.masks_per_image}; "
                    f"try {-(-count // self.masks_per_image) * self.masks_per_image}"
                )

    @property
    def reading(self) -> "PretrainConfig":
        """The same run counted in decoded images: a pass over them is as many epochs as each has masks.

        Steps, masked images a step, learning rates and, in samples, every duration are those of the recipe.
        """
        views = self.masks_per_image
        if views == 1:
            return self
        data, optim, replace = self.data, self.optim, dataclasses.replace
        return replace(
            self,
            epochs=self.epochs // views,
            masks_per_image=1,
            data=replace(data, batch=data.batch // views, micro_batch=data.micro_batch // views),
            optim=replace(optim, base_lr=optim.base_lr * views, warmup_epochs=optim.warmup_epochs / views),
            checkpoint=replace(self.checkpoint, every_epochs=self.checkpoint.every_epochs / views),
            tracking=replace(
                self.tracking, pictures_every_epochs=max(1, round(self.tracking.pictures_every_epochs / views))
            ),
        )


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig:
    """Fine-tuning, linear probing or training from scratch: a classifier on labelled images (Tables 9 to 11)."""

    name: str = ""
    """Name of the run; empty for the preset's name and a hash of the config."""
    output: str = "runs"
    """Folder or s3:// prefix under which runs keep checkpoints and metrics."""
    backbone: str = "models:/mae-vit_base_patch16@candidate"
    """Registered model to start from (models:/NAME@ALIAS or models:/NAME/VERSION), or random:<arch> for none;
    `mae finetune` and `mae probe` know it as --model too."""
    image_px: tuple[int, int] | None = None
    """Height and width of the input; without a value those of the backbone (of the stored images for random)."""
    seed: int = 0
    """Seed of head, order, augmentation, mixup and drop path."""
    epochs: int = 100
    """Passes over the training split."""
    data: DataConfig = field(default_factory=lambda: DataConfig(batch=1024))
    """Dataset and batch."""
    classifier: ClassifierConfig = field(default_factory=ClassifierConfig)
    """What learns, and what is classified."""
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(
            base_lr=5e-4, min_lr=1e-6, warmup_epochs=5.0, betas=(0.9, 0.999), layer_decay=0.65
        )
    )
    """Optimizer and schedule."""
    augment: AugmentConfig = field(default_factory=lambda: AugmentConfig(scale=(0.08, 1.0)))
    """Augmentation of training images."""
    eval_split: Literal["val", "test"] = "val"
    """Split on which the final accuracy is measured; test is for the end of a study, once."""
    eval_every_epochs: int = 10
    """Epochs between two evaluations on val while training."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    """Workers and precision."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """Checkpoints."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """MLflow."""

    def __post_init__(self) -> None:
        _check_epochs(self.epochs, self.optim)
        if self.image_px is not None and min(self.image_px) < 1:
            raise ValueError(f"image_px {self.image_px[0]} x {self.image_px[1]} is below 1; try 224 224")
        if self.eval_every_epochs < 1:
            raise ValueError(f"eval_every_epochs {self.eval_every_epochs} is below 1; try 10")
        if self.backbone.startswith("random:"):
            parse_arch(self.backbone.removeprefix("random:"))
        elif not self.backbone.startswith("models:/"):
            raise ValueError(
                f"backbone {self.backbone!r} is neither models:/NAME@ALIAS, models:/NAME/VERSION nor random:<arch>; "
                "try models:/mae-vit_base_patch16@candidate"
            )


def parse_space(words: list[str]) -> dict[str, list[Any]]:
    """The space that words such as `model.mask.ratio=0.5,0.75` describe; values are read as YAML."""
    space = {}
    for word in words:
        dotted, equals, values = word.partition("=")
        if not equals or not values:
            raise ValueError(f"space {word!r} is not FIELD=V1,V2; try model.mask.ratio=0.5,0.75")
        try:
            space[dotted] = yaml.safe_load(f"[{values}]")
        except yaml.YAMLError:
            raise ValueError(f"{values!r} for {dotted} is no list of values; try model.mask.ratio=0.5,0.75") from None
    return space


_SPACE_FLAG = tyro.constructors.PrimitiveConstructorSpec(
    nargs="*",
    metavar="FIELD=V1,V2 ...",
    instance_from_str=parse_space,
    is_instance=lambda value: isinstance(value, dict),
    str_from_instance=lambda space: [f"{k}={','.join(map(str, v))}" for k, v in space.items()],
)

PROBE = ClassifyConfig(
    epochs=90,
    data=DataConfig(batch=16384, micro_batch=512),
    classifier=ClassifierConfig(method="probe", pool="token", head_std=0.01),
    optim=OptimConfig(name="lars", base_lr=0.1, warmup_epochs=10.0, weight_decay=0.0),
    augment=AugmentConfig(scale=(0.08, 1.0)),
)
"""Linear probing as in Table 10, what `mae probe` starts from where no preset is named."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """A search: every trial pretrains, is probed and fine-tuned; the best on val is registered."""

    name: str = ""
    """Name of the sweep; empty for the preset's name and a hash of the config."""
    output: str = "runs"
    """Folder or s3:// prefix under which the ledger, the table, the figure and the best preset are written."""
    space: Annotated[dict[str, list[Any]], _SPACE_FLAG] = field(
        default_factory=lambda: {"model.mask.ratio": [0.5, 0.75, 0.9], "model.decoder_depth": [1, 4]}
    )
    """Dotted fields of `pretrain`, each with the values to try, such as model.mask.ratio=0.5,0.75."""
    search: Literal["grid", "random"] = "grid"
    """grid tries every combination; random draws num_trials of them without repetition."""
    num_trials: int = 8
    """Trials of a random search."""
    seed: int = 0
    """Seed of a random search."""
    max_concurrent: int = 1
    """Worker groups that run at the same time."""
    trials_per_group: int = 1
    """Trials that one worker group runs in turn; more save the start of a group where trials take seconds."""
    select_by: Literal["finetune", "probe"] = "finetune"
    """Accuracy on val that decides the best trial."""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """What every trial pretrains, before the point of the space is applied."""
    probe: ClassifyConfig = field(default_factory=lambda: PROBE)
    """How a trial is probed; data.uri, backbone and compute are the trial's own."""
    finetune: ClassifyConfig = field(default_factory=ClassifyConfig)
    """How a trial is fine-tuned; data.uri, backbone and compute are the trial's own."""

    def __post_init__(self) -> None:
        if not self.space or not all(isinstance(v, list) and v for v in self.space.values()):
            raise ValueError(
                "space must name at least one field with a list of values; try model.mask.ratio: [0.5, 0.75]"
            )
        if self.probe.classifier.method != "probe" or self.finetune.classifier.method != "finetune":
            raise ValueError("probe.classifier.method must be probe and finetune.classifier.method finetune")
        if min(self.num_trials, self.max_concurrent, self.trials_per_group) < 1:
            raise ValueError("num_trials, max_concurrent and trials_per_group must be at least 1; try 8, 1 and 1")


@dataclass(frozen=True, kw_only=True)
class ReconstructConfig:
    """Pictures in the manner of Figures 2 and 3: masked | reconstruction | original."""

    model: str = "models:/mae-vit_base_patch16@candidate"
    """Registered backbone whose reconstructions are drawn."""
    uri: str = ""
    """Prepared dataset, or a folder of images."""
    split: str = "test"
    """Split of a prepared dataset that images are taken from."""
    ratios: tuple[float, ...] = (0.75, 0.8)
    """Mask ratios, one block of rows each."""
    num_images: int = 12
    """Images drawn, spread evenly over the split."""
    seed: int = 0
    """Seed of the masks."""
    out: str = "reconstructions.png"
    """File that is written."""

    def __post_init__(self) -> None:
        if not self.ratios or self.num_images < 1:
            raise ValueError("ratios and num_images must name at least one; try --ratios 0.75 0.8 --num-images 12")
        if not self.out.lower().endswith((".png", ".jpg", ".jpeg", ".webp")):
            raise ValueError(f"out {self.out!r} is no picture's name; try reconstructions.png")


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """A look at a prepared dataset, or at a source before it is prepared."""

    num_images: int = 32
    """Samples drawn, and at most as many of the quarantine."""
    seed: int = 0
    """Seed of the choice from a source."""
    out: str = "contact-sheet.png"
    """File that the sheet is written to."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_images <= 1000:
            raise ValueError(f"num_images {self.num_images} is outside [1, 1000]; try 32")


@dataclass(frozen=True, kw_only=True)
class RegisterConfig:
    """A checkpoint of a pretraining run becomes a version of a registered model."""

    name: str = ""
    """Registered model; empty for the run's own, mae-<arch>."""
    experiment: str = ""
    """MLflow experiment that holds the run; empty for the run's own."""

    def __post_init__(self) -> None:
        _check_model_name(self.name)


@dataclass(frozen=True, kw_only=True)
class RunsConfig:
    """Runs with their state, step, last checkpoint and loss."""

    watch: bool = False
    """Follow one run, a line for each step that leaves metrics, until it has ended."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole pipeline on the embedded sample, in minutes."""

    output: str = "mae-demo"
    """Folder for everything that the demo writes."""
    seeds: int = 3
    """Fine-tunings and trainings from scratch that are averaged."""


T = TypeVar("T")


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """The config that a dict describes, defaults filled in. Raises ValueError that names each wrong key or value."""
    if not isinstance(values, dict):
        raise ValueError(f"expected fields of {cls.__name__}, got {values!r}; try `key: value` lines")
    unknown = list(_unknown_keys(cls, values, ""))
    if unknown:
        raise ValueError("; ".join(unknown))
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise ValueError(_in_words(error)) from None


def to_dict(config: Any) -> dict[str, Any]:
    """Plain dicts, lists and scalars, such that from_dict(type(config), to_dict(config)) == config."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def with_overrides(config: T, point: dict[str, Any]) -> T:
    """The config with dotted fields replaced, as `{"model.mask.ratio": 0.5}`."""
    values = to_dict(config)
    for dotted, value in point.items():
        *parents, last = dotted.split(".")
        inner = values
        for parent in parents:
            inner = inner.setdefault(parent, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{dotted} does not name a field of {type(config).__name__}: {parent} has no fields")
        inner[last] = value
    return from_dict(type(config), values)


def load_preset(cls: type[T], preset: str) -> T:
    """The config in a YAML file, or in the shipped preset of that name."""
    path = Path(preset) if preset.endswith((".yaml", ".yml")) else PRESETS / f"{preset}.yaml"
    if not path.is_file():
        names = sorted(p.stem for p in PRESETS.glob("*.yaml"))
        near = difflib.get_close_matches(preset, names, 1)
        raise ValueError(f"no preset {preset!r}; {f'did you mean {near[0]}?' if near else 'try ' + ', '.join(names)}")
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"preset {preset!r} is not YAML: {' '.join(str(error).split())}; mend it there") from None
    kind = values.pop("kind", None) if isinstance(values, dict) else None
    if kind != KINDS[cls]:
        raise ValueError(
            f"preset {preset!r} is for `mae {kind}`, not for {KINDS[cls]}; its first key must be kind: {KINDS[cls]}"
        )
    return from_dict(cls, values)


KINDS: dict[type, str] = {PretrainConfig: "pretrain", ClassifyConfig: "classify", SweepConfig: "sweep"}


def identity(config: Any) -> dict[str, Any]:
    """What decides a run's result: not what it is called, where it is written or how many workers share the work."""
    values = to_dict(config)
    for part in (values, values.get("pretrain", {}), values.get("probe", {}), values.get("finetune", {})):
        for key in ("name", "output", "tracking", "checkpoint"):
            part.pop(key, None)
        if "compute" in part:
            part["precision"] = part.pop("compute")["precision"]
        # Where the dataset lies does not matter either: its digest is its identity.
        part.get("data", {}).pop("uri", None)
    return values


def config_hash(config: Any, dataset_digest: str) -> str:
    """Twelve hex digits over the config's identity and the dataset's."""
    said = json.dumps([identity(config), dataset_digest], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:12]


def run_name(config: Any, preset: str, dataset_digest: str) -> str:
    """The given name, or the preset's stem and a hash of config and dataset."""
    return config.name or f"{Path(preset).stem}-{config_hash(config, dataset_digest)}"


def _unknown_keys(cls: Any, values: dict[str, Any], prefix: str) -> Iterator[str]:
    known = {f.name: f.type for f in dataclasses.fields(cls)}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known are {', '.join(known)}"
            yield f"unknown key {prefix}{key}; {hint}"
        elif dataclasses.is_dataclass(known[key]) and isinstance(value, dict):
            yield from _unknown_keys(known[key], value, f"{prefix}{key}.")


def _in_words(error: ValidationError) -> str:
    lines = []
    for e in error.errors():
        where = ".".join(str(part) for part in e["loc"])
        message = e["msg"].removeprefix("Value error, ")
        got = "" if e["type"] == "value_error" else f", got {e['input']!r}"
        lines.append(f"{where}: {message}{got}" if where else message)
    return "; ".join(lines)
