"""Options of `mae bench recipes`, `data`, `embed`, `feed`, `prepare` and `start`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mae_core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RecipesConfig:
    """Pretraining recipes that get equal time, in this process with one worker, compared by linear probes."""

    uri: str = ""
    """Prepared dataset with labels."""
    recipes: tuple[str, ...] = ("nano", "nano_fast")
    """Presets or YAML files for `mae pretrain`; the time budget replaces their epochs."""
    probe: str = "nano_probe"
    """Preset of the linear probe; it must not augment images at random."""
    labels_per_class: int = 500
    """Labelled training images per class for the probe."""
    eval_split: str = "val"
    """Split on which the probe is evaluated."""
    budget_s: float = 600.0
    """Seconds of pretraining in a full run; learning rates follow the share of a run's time that is spent."""
    shares: tuple[float, ...] = (0.4, 1.0)
    """Shares of the budget, each a separate run; 0 probes the encoder without pretraining."""
    seeds: int = 3
    """Runs per recipe and share, with seeds 0, 1 and so on."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: CPU seconds of this process, for one thread (OMP_NUM_THREADS=1) on a shared machine."""
    out: str = "recipes.jsonl"
    """Output file, one JSON line per run; rerunning the command adds only the missing runs."""

    def __post_init__(self) -> None:
        if self.budget_s <= 0 or self.seeds < 1 or not self.shares or not all(0 <= s <= 1 for s in self.shares):
            raise UserError("budget_s and seeds must be positive and shares within [0, 1]; try 600, 3 and 0.4 1.0")
        if self.labels_per_class < 1:
            raise UserError(f"labels_per_class {self.labels_per_class} is below 1; try 500")


@dataclass(frozen=True, kw_only=True)
class DataBenchConfig:
    """Decoding of images per core, and the whole path from shards in S3 to training, against other loaders."""

    source: Path | None = None
    """Folder of images; if not set, imagenet-sample.tar in MAE_TEST_DATA, or in ../shared/data."""
    max_images: int = 250
    """Maximum number of images decoded per round."""
    rounds: int = 9
    """Rounds; each measures every variant once, and results are medians over them."""
    whole_path: bool = True
    """Also measure the path from shards in S3 through Ray Data to this process, against torch's DataLoader."""
    cores: int = 2
    """Cores that all processes of one path share: Ray and the S3 server, or DataLoader's workers."""
    epoch_images: int = 4096
    """Images per epoch of the whole path; the source's images are repeated as needed."""
    gpu_images_per_s: float = 1500.0
    """Training rate of one GPU in images/s, for the number of decoding cores that it needs."""

    def __post_init__(self) -> None:
        for name in ("max_images", "rounds", "cores", "epoch_images"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} is below 1; try 1")


@dataclass(frozen=True, kw_only=True)
class EmbedBenchConfig:
    """Embedding of images on the same cores: the bare encoder, `mae embed`, and timm behind torch's DataLoader."""

    source: Path | None = None
    """Folder of images; if not set, imagenet-sample.tar in MAE_TEST_DATA, or in ../shared/data."""
    arch: str = "vit_base_patch16"
    """Encoder, with random weights."""
    image_px: int = 224
    """Side of the input."""
    num_images: int = 256
    """Images per round; the source's images are repeated as needed."""
    batch: int | None = None
    """Images per forward pass of all variants; if not set, what `mae embed` chooses."""
    rounds: int = 5
    """Rounds; each measures every variant once, and results are medians over them."""
    cores: int = 2
    """Cores that all processes of one variant share."""

    def __post_init__(self) -> None:
        for name, good in (("image_px", 224), ("num_images", 256), ("batch", 8), ("rounds", 5), ("cores", 2)):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} {value} is below 1; try {good}")


@dataclass(frozen=True, kw_only=True)
class PrepareBenchConfig:
    """Preparing images on one core and on several, beside another version of this project and MosaicML's MDSWriter."""

    source: Path | None = None
    """Folder of images; if not set, imagenet-sample.tar in MAE_TEST_DATA, or in ../shared/data."""
    num_images: int = 2048
    """Images per round; the source's images are repeated as needed."""
    rounds: int = 3
    """Rounds; each measures every variant once, and results are medians over them."""
    cores: int = 2
    """Cores that all processes of one variant share."""
    other: Path | None = None
    """Checkout of another version of this project to measure too."""
    mds: Path | None = None
    """Folder that mosaicml-streaming is installed in (pip install --target); MDSWriter is measured if it is set."""

    def __post_init__(self) -> None:
        for name, good in (("num_images", 2048), ("rounds", 3), ("cores", 2)):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} is below 1; try {good}")


@dataclass(frozen=True, kw_only=True)
class StartBenchConfig:
    """The time from `mae pretrain` to its first training step, by stage."""

    preset: str = "nano"
    """Preset of the pretraining; its images are drawn."""
    rounds: int = 3
    """Starts to take medians of, after a first one that warms caches."""
    compile: bool = False
    """Compile the model."""

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise UserError(f"rounds {self.rounds} is below 1; try 3")


@dataclass(frozen=True, kw_only=True)
class FeedBenchConfig:
    """The feed's own cost on several nodes, each a raylet on this machine: ranks only check what they get."""

    nodes: tuple[int, ...] = (1, 4)
    """Numbers of nodes to compare."""
    ranks_per_node: int = 8
    """Ranks on each node."""
    designs: tuple[Literal["cluster", "node", "rank"], ...] = ("cluster", "node")
    """What one coordinator feeds: all ranks of the cluster, those of its node, or a single rank."""
    block_mib: float = 2.0
    """Size of a block in MiB, of made pixels."""
    windows: int = 16
    """Shuffle windows per round; each has two blocks for every rank, and more in the first."""
    rounds: int = 3
    """Rounds; each measures every design with every number of nodes once, and results are medians over them."""

    def __post_init__(self) -> None:
        for name, least, good in (("ranks_per_node", 1, 8), ("windows", 3, 16), ("rounds", 1, 3)):
            if getattr(self, name) < least:
                raise UserError(f"{name} {getattr(self, name)} is below {least}; try {good}")
        if not self.nodes or min(self.nodes) < 1 or not self.designs:
            raise UserError(f"nodes {self.nodes} and designs {self.designs} must name one each; try 1 4 and node")
        if self.block_mib <= 0:
            raise UserError(f"block_mib {self.block_mib:g} is not positive; try 2")
