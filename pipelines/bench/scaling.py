"""Analytical model of the training step on 8, 64 and 512 GPUs: what bounds it, written as a page of the docs.

python -m pipelines.bench.scaling > docs/scaling.md
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mae_core.config import ModelConfig, parse_arch
from pipelines.feed.data_task import max_per_block


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Rates of GPUs, network, CPUs and storage. The defaults are assumptions, each stated on the page."""

    matmul_flops_s: float = 8.0e14
    """Dense bf16 matrix products of an H100, as others measured for large ones; its data sheet says 9.9e14."""
    mfu: float = 0.5
    """Share of `matmul_flops_s` that a step with large micro-batches reaches: the target for ViT-L."""
    launch_s: float = 6e-6
    """Host time per kernel launch, the lower bound of a small micro-batch without CUDA graphs."""
    node_bytes_s: float = 3.0e11
    """Send rate per GPU in a ring within a node of 8 (NVLink)."""
    network_bytes_s: float = 4.0e10
    """Send rate per GPU in a ring over nodes: 400 Gbit/s per GPU at 80 %."""
    gpus_per_node: int = 8
    cores_per_gpu: float = 14.0
    """Decoding CPU cores per GPU."""
    images_s_per_core: float = 700.0
    """Rate of decoding, cropping and resizing ImageNet images on one core; two virtual cores, shared with the S3
    server, reached 1,531 images/s together."""
    block_s: float = 6e-3
    """Time of the feed's coordinator per block; measured as 5.7 ms of a virtual core."""
    snapshot_bytes_s: float = 5.0e9
    """Copy rate from a GPU to pageable host memory."""
    storage_bytes_s: float = 1.0e9
    """Write rate from rank 0 to the object store."""
    gpu_failures_per_h: float = 2.0e-5
    """Interruptions per GPU-hour: 419 in 54 days of 16,384 GPUs (Llama 3, 2024)."""
    restart_s: float = 120.0
    """Time from a failure to the next step: detect it, start the group, read the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Model, batch and epoch of a training run."""

    model: ModelConfig
    batch: int = 4096
    micro_batch: int = 64
    epoch_images: int = 1_281_167
    epochs_between_checkpoints: float = 1.0
    window: int = 8192


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Times of one step on `num_gpus` GPUs, in seconds, and the goodput after failures."""

    num_gpus: int
    compute_s: float
    launch_s: float
    exposed_s: float
    """All-reduce of gradients that does not overlap with the backward pass."""
    data_s: float
    """Decoding of a step's images on all cores; it overlaps with the step."""
    feed_s: float
    """Work of the one process that hands every block to its rank; it overlaps with the step."""
    checkpoint_s: float
    """The step's share of snapshots, for which it waits, and of writing beyond the checkpoint interval."""
    goodput: float
    """Share of time that remains after failures."""
    bound: str
    """What takes the largest share of the step."""

    @property
    def step_s(self) -> float:
        return max(self.compute_s, self.launch_s, self.data_s, self.feed_s) + self.exposed_s + self.checkpoint_s

    @property
    def images_s(self) -> float:
        """Throughput without failures."""
        return self._images / self.step_s

    _images: int = 4096


def layer_flops(width: int, tokens: int) -> float:
    """Count the forward multiplications and additions of one transformer layer for one image."""
    return 24 * width * width * tokens + 4 * width * tokens * tokens


def forward_flops(model: ModelConfig) -> float:
    """Count the forward operations for one image; only visible patches enter the encoder, all tokens the decoder."""
    arch, patches = parse_arch(model.arch), model.num_patches
    pixels = arch.patch_px**2 * model.channels
    visible, decoder = model.num_visible, model.decoder_width
    encoder = 2 * visible * pixels * arch.width + arch.depth * layer_flops(arch.width, visible + 1)
    embed = 2 * (visible + 1) * arch.width * decoder
    return (
        encoder
        + embed
        + model.decoder_depth * layer_flops(decoder, patches + 1)
        + 2 * (patches - visible) * decoder * pixels
    )


def num_parameters(model: ModelConfig) -> int:
    """Count the trained weights, to within 1 %: transformer layers, patch embedding, both ends of the decoder."""
    arch, decoder = parse_arch(model.arch), model.decoder_width
    pixels = arch.patch_px**2 * model.channels
    blocks = 12 * arch.depth * arch.width**2 + 12 * model.decoder_depth * decoder**2
    return blocks + pixels * arch.width + arch.width * decoder + pixels * decoder


def estimate(run: Run, cluster: Cluster, num_gpus: int) -> Estimate:
    """Estimate the step on `num_gpus` GPUs.

    The backward pass is two thirds of the computation, and the all-reduce overlaps with it.
    """
    per_gpu = run.batch / num_gpus
    compute_s = 3 * forward_flops(run.model) * per_gpu / (cluster.matmul_flops_s * cluster.mfu)
    num_micro = math.ceil(per_gpu / run.micro_batch)
    layers = parse_arch(run.model.arch).depth + run.model.decoder_depth
    launch_s = (num_micro * layers * 60 + layers * 4) * cluster.launch_s
    busy_s = max(compute_s, launch_s)

    comm_s = all_reduce_s(4 * num_parameters(run.model), cluster, num_gpus)
    hidden_s = 2 / 3 * busy_s / num_micro  # DDP reduces gradients in the last micro-batch's backward pass only.
    exposed_s = max(0.0, comm_s - hidden_s)

    data_s = run.batch / (num_gpus * cluster.cores_per_gpu * cluster.images_s_per_core)
    feed_s = run.batch / images_per_block(run, num_gpus) * cluster.block_s
    hidden_behind_s = max(busy_s, data_s, feed_s)
    steps = run.epochs_between_checkpoints * run.epoch_images / run.batch
    state_bytes = 12 * num_parameters(run.model)
    interval_s = steps * (hidden_behind_s + exposed_s)
    late_s = max(0.0, state_bytes / cluster.storage_bytes_s - interval_s)
    checkpoint_s = (state_bytes / cluster.snapshot_bytes_s + late_s) / steps

    lost_s = interval_s / 2 + cluster.restart_s
    goodput = 1 / (1 + lost_s * num_gpus * cluster.gpu_failures_per_h / 3600)
    parts = {
        "arithmetic": compute_s if compute_s == hidden_behind_s else 0.0,
        "kernel launches": launch_s if launch_s == hidden_behind_s else 0.0,
        "decoding": data_s if data_s == hidden_behind_s else 0.0,
        "the feed": feed_s if feed_s == hidden_behind_s else 0.0,
        "the network": exposed_s,
        "checkpoints": checkpoint_s,
    }
    return Estimate(
        num_gpus=num_gpus,
        compute_s=compute_s,
        launch_s=launch_s,
        exposed_s=exposed_s,
        data_s=data_s,
        feed_s=feed_s,
        checkpoint_s=checkpoint_s,
        goodput=goodput,
        bound=max(parts, key=lambda name: parts[name]),
        _images=run.batch,
    )


def images_per_block(run: Run, num_gpus: int) -> int:
    """Count the images in a block of the feed, at most one rank's share of a shuffle window."""
    micro_batch = min(run.micro_batch, max(1, run.batch // num_gpus))
    height_px, width_px = run.model.image_px
    image_bytes = height_px * width_px * run.model.channels
    in_window = max(1, run.window // (num_gpus * micro_batch))
    return micro_batch * min(in_window, max_per_block(micro_batch * image_bytes, num_gpus))


def all_reduce_s(num_bytes: float, cluster: Cluster, num_gpus: int) -> float:
    """Return the seconds of an all-reduce: a ring within each node, then one over nodes."""
    if num_gpus == 1:
        return 0.0
    local = min(num_gpus, cluster.gpus_per_node)
    inside_s = 2 * (local - 1) / local * num_bytes / cluster.node_bytes_s
    nodes = math.ceil(num_gpus / cluster.gpus_per_node)
    # Each GPU of a node sends its share of the gradients over the network.
    between_s = 2 * (nodes - 1) / nodes * num_bytes / local / cluster.network_bytes_s
    return inside_s + between_s


MODELS = {
    "ViT-B/16": ModelConfig(arch="vit_base_patch16"),
    "ViT-L/16": ModelConfig(arch="vit_large_patch16"),
    "ViT-H/14": ModelConfig(arch="vit_huge_patch14"),
}
SIZES = (8, 64, 512)


def table(runs: dict[str, Run], cluster: Cluster, sizes: Sequence[int] = SIZES) -> str:
    """Format the estimates as a Markdown table, one row per run and number of GPUs."""
    lines = [
        "| model | GPUs | images per GPU | arithmetic | launches | network, not hidden | decoding | feed "
        "| checkpoints | step | images/s | after failures | bound by |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for name, run in runs.items():
        for size in sizes:
            found = estimate(run, cluster, size)
            milliseconds = [found.compute_s, found.launch_s, found.exposed_s, found.data_s, found.feed_s]
            cells = [f"{1000 * value:,.1f}" for value in (*milliseconds, found.checkpoint_s, found.step_s)]
            lines.append(
                f"| {name} | {size} | {run.batch // size} | {' | '.join(cells)} | {found.images_s:,.0f} "
                f"| {found.goodput:.2%} | {found.bound} |"
            )
    return "\n".join(lines)


def page() -> str:
    """Return the content of docs/scaling.md."""
    cluster = Cluster()
    wide = Run(model=MODELS["ViT-L/16"], window=131_072)
    table_8 = {name: Run(model=model) for name, model in MODELS.items()}
    return f"""# Scaling on paper

Generated by `python -m pipelines.bench.scaling > docs/scaling.md`; change the assumptions there and regenerate it.
**Nothing on this page was measured on more than one machine.** It states what to expect, and where to look first if a
run is slower.

Milliseconds per step of {4096:,} images, with the recipe of Table 8, bfloat16, and gradients in float32:

{table(table_8, cluster)}

- **arithmetic**: 3 x the operations of the forward pass / (GPUs x {cluster.matmul_flops_s:.1e} FLOP/s x an MFU of \
{cluster.mfu:.0%}).
- **launches**: 60 kernels per transformer layer and micro-batch at {cluster.launch_s * 1e6:.0f} us. If they exceed \
the arithmetic, a GPU waits for its host: compile, capture CUDA graphs, or use fewer GPUs or larger batches.
- **network**: a ring within the node ({cluster.node_bytes_s:.0e} bytes/s) and one over nodes \
({cluster.network_bytes_s:.0e} bytes/s per GPU), less what the last micro-batch's backward pass hides.
- **decoding**: {cluster.cores_per_gpu:.0f} cores per GPU at {cluster.images_s_per_core:.0f} images/s each. It bounds \
the step only if it exceeds the rest. Shrunk sources, or several masks per decoded image, reduce it.
- **feed**: {cluster.block_s * 1e3:.0f} ms for each block that Ray Data's one coordinator hands to a rank. A block \
holds up to {images_per_block(table_8["ViT-L/16"], 8)} images for 8 GPUs, and at most one rank's share of a shuffle \
window of {table_8["ViT-L/16"].window:,} images. **It is the first bound on large clusters**: use a larger \
`data.window` there (131,072 at 64 GPUs: {1000 * estimate(wide, cluster, 64).feed_s:.0f} ms). Several feeds would \
remove it.
- **checkpoints**: weights and both moments, once per epoch, copied at {cluster.snapshot_bytes_s:.0e} bytes/s while \
the step waits, and written at {cluster.storage_bytes_s:.0e} bytes/s while it does not.
- **after failures**: each GPU fails {cluster.gpu_failures_per_h:.0e} times an hour. Each failure loses half a \
checkpoint interval and {cluster.restart_s:.0f} s.

Compare with the shares of a real run: `goodput/*` in MLflow, and `goodput` in its `result.json`.

## What was checked
- The operation counts equal those in the presets' headers (ViT-L: 124 GFLOP per image and step), by a test.
- Limits that any such model must satisfy (one GPU sends nothing, more GPUs never add arithmetic), by tests.
- The cost of a block of the feed: two sizes of block with the same images, on one machine of two cores; not with many \
ranks.
- The loop around the step: `python -m pipelines.bench.loop_overhead` measures what it adds, interleaved.
"""


if __name__ == "__main__":
    print(page(), end="")
