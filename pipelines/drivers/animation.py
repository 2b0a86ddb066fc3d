"""`mae reconstruct --run`: an animation of the reconstructions by a run's checkpoints."""

import dataclasses
import io
import json
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from mae_core.errors import UserError
from mae_core.model import build_mae
from mae_core.normalization import Normalization
from mae_core.state import unpack
from pipelines.config import PretrainConfig, ReconstructConfig, from_dict
from pipelines.pictures.figures import Block, reconstruction_rows
from pipelines.pictures.reconstruct import blocks_of, images_of
from pipelines.runs.folder import RunFolder
from pipelines.storage import storage_of

_LAST_FRAMES = 4
"""How many times as long the last frame is shown."""


def animate(config: ReconstructConfig) -> str:
    """Write a GIF, WebP or APNG with a frame for each checkpoint that the run has kept; return its path or URI.

    All frames have the same images and masks. The last frame is shown longer. Raises UserError if the folder holds no
    pretraining, or only one checkpoint.
    """
    folder = RunFolder(config.run)
    values = folder.read_identity()
    if values is None or values.get("kind") != "pretrain":
        raise UserError(f"{config.run} is not the folder of a pretraining run; try the one that `mae pretrain` printed")
    steps = folder.checkpoints.steps()
    if len(steps) < 2:
        raise UserError(
            f"run {config.run} has kept {len(steps)} checkpoints, of which an animation needs two; pretrain with "
            "--checkpoint.keep-every-epochs 1"
        )
    output, name = storage_of(config.out)
    run = from_dict(PretrainConfig, json.loads(folder.storage.read("config.json")))
    normalization = from_dict(Normalization, folder.read_pixels())
    config = _with_images(config, run)
    mae = build_mae(run.model, seed=0).eval()
    images = images_of(config, mae, normalization)
    frames: list[Image.Image] = []
    for step in steps:
        checkpoint = folder.checkpoints.load(step)
        files = checkpoint.files
        mae.load_state_dict(unpack(files.get("ema.safetensors", files["model.safetensors"])))
        epoch = step / checkpoint.meta["steps_per_epoch"]
        blocks = blocks_of(config, mae, normalization, images)
        frames.append(_drawn([Block(title=f"epoch {epoch:g}: {b.title}", rows=b.rows) for b in blocks]))
    output.write(name, encoded(frames, Path(name).suffix.lower(), config.frame_s))
    return output.join(name)


def encoded(frames: list[Image.Image], suffix: str, frame_s: float) -> bytes:
    """Encode frames of one size as a looping GIF, WebP or APNG."""
    duration_ms = [round(1000 * frame_s)] * (len(frames) - 1) + [round(1000 * frame_s * _LAST_FRAMES)]
    file = io.BytesIO()
    kind = {".gif": "GIF", ".webp": "WEBP", ".png": "PNG"}[suffix]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=duration_ms, loop=0)
    return file.getvalue()


def _with_images(config: ReconstructConfig, run: PretrainConfig) -> ReconstructConfig:
    """Return the config with the images of the run's own dataset, if it names none."""
    return config if config.uri else dataclasses.replace(config, uri=run.data.uri)


def _drawn(blocks: list[Block]) -> Image.Image:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "frame.png"
        reconstruction_rows(blocks, path)
        with Image.open(path) as image:
            return image.convert("RGB")
