"""Options of the commands that pass every image of a dataset through a model."""

from dataclasses import dataclass
from typing import Literal

from mae_core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ActorConfig:
    """How images are read, and on what the model runs."""

    batch: int | None = None
    """Images per forward pass; if not set, chosen from the model's size. On a GPU, one that does not fit is halved."""
    rows_per_part: int = 1024
    """Most images per Parquet file, the unit of resuming; rounded to full batches, and fewer in a small dataset."""
    actors: int | None = None
    """Copies of the model that work in parallel; if not set, one per GPU, or one per `threads` CPUs."""
    threads: int = 1
    """CPU threads of the model in each actor."""
    gpu: bool = False
    """Give each actor a GPU."""
    max_bad: float = 0.01
    """Share of images that may be quarantined; with more the job fails."""
    max_pixels: int = 64_000_000
    """Images of a source with more pixels are quarantined by their header, before they are decoded."""

    def __post_init__(self) -> None:
        for name, good in (
            ("batch", 64),
            ("rows_per_part", 1024),
            ("actors", 2),
            ("threads", 1),
            ("max_pixels", 64_000_000),
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} {value} is below 1; try {good}")
        if not 0 <= self.max_bad <= 1:
            raise UserError(f"max_bad {self.max_bad} is outside [0, 1]; try 0.01, or 1 to allow any number")


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(ActorConfig):
    """Embeddings of every image of a dataset, in Parquet."""

    model: str = "models:/mae-vit_base_patch16@candidate"
    """Registered backbone (models:/NAME@ALIAS or models:/NAME/VERSION), or the export/ folder of a pretraining run."""
    pool: Literal["avg", "token"] = "avg"
    """avg: the mean of the patch tokens; token: the class token."""
    last_layers: int = 1
    """Number of last blocks whose pooled tokens are concatenated, the earliest first."""
    patch_tokens: bool = False
    """Also store all patch tokens of the last block, row by row: hundreds of times the size."""
    stored_as: Literal["float16", "float32"] = "float32"
    """Type in which values are stored; they are computed in float32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last_layers < 1:
            raise UserError(f"last_layers {self.last_layers} is below 1; try 1, or 4")


@dataclass(frozen=True, kw_only=True)
class PredictConfig(ActorConfig):
    """Class and probabilities of every image of a bucket or folder, in Parquet."""


@dataclass(frozen=True, kw_only=True)
class CurateConfig(ActorConfig):
    """Images ranked by their reconstruction loss, the lowest and highest of which can be left out."""

    model: str = "models:/mae-vit_base_patch16@candidate"
    """Registered backbone (models:/NAME@ALIAS or models:/NAME/VERSION), or the export/ folder of a pretraining run."""
    masks: int = 4
    """Masks over which each image's loss is averaged; each depends on seed, image id and its number."""
    seed: int = 0
    """Seed of the masks."""
    drop_lowest: float = 0.05
    """Share of the training images to list in lowest.txt: those that are reconstructed best, such as blank ones."""
    drop_highest: float = 0.01
    """Share of the training images to list in highest.txt: those that are reconstructed worst, such as noise."""
    num_images: int = 12
    """Images in each of the two pictures."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, good in (("masks", 4), ("num_images", 12)):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} is below 1; try {good}")
        for name, good in (("drop_lowest", 0.05), ("drop_highest", 0.01)):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} is outside [0, 1); try {good}, or 0 for none")
        if self.drop_lowest + self.drop_highest >= 1:
            raise UserError(
                f"drop_lowest {self.drop_lowest} and drop_highest {self.drop_highest} leave no image; try 0.05 and 0.01"
            )


@dataclass(frozen=True, kw_only=True)
class NeighboursConfig:
    """Nearest neighbours of each embedding by cosine similarity, and near-duplicates."""

    out: str = ""
    """Folder or s3:// prefix of the results; if empty, EMBEDDINGS itself."""
    k: int = 10
    """Neighbours per image."""
    duplicates_above: float = 0.99
    """Cosine similarity above which two images count as near-duplicates."""
    transform: Literal["none", "centre", "whiten"] = "centre"
    """centre: subtract the mean of all embeddings first, a large part of each that hides differences; whiten: also give
    all directions equal variance, which often agrees better with labels and lowers all scores."""
    index: Literal["exact", "ivf"] = "exact"
    """exact: compare all pairs; ivf: faiss's inverted lists, much faster from some 100,000 images on, not exact."""
    queries: int = 10
    """Images in the picture, spaced evenly over all."""
    source: str = ""
    """Where the images are now, for the picture; if empty, where `mae embed` read them."""

    def __post_init__(self) -> None:
        for name, good in (("k", 10), ("queries", 10)):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} is below 1; try {good}")
        if not -1 < self.duplicates_above <= 1:
            raise UserError(f"duplicates_above {self.duplicates_above} is outside (-1, 1]; try 0.99")
