"""What bounds a training step on 8, 64 and 512 GPUs: a model on paper, as a page.

python -m pipelines.bench.scaling > docs/scaling.md
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mae_core.config import ModelConfig, parse_arch
from pipelines.feed.data_task import most_per_block


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a GPU and what connects it can do. The defaults are assumptions, each named on the page."""

    matmul_flops_s: float = 8.0e14
    """Dense bf16 matrix products of an H100, as measured elsewhere for large ones; its data sheet says 9.9e14."""
    mfu: float = 0.5
    """Share of that which a step reaches where its micro-batches are large: the target for ViT-L."""
    launch_s: float = 6e-6
    """Host time of one kernel, below which a small micro-batch cannot go without CUDA graphs."""
    node_bytes_s: float = 3.0e11
    """What each GPU sends in a ring within a node of 8 (NVLink)."""
    network_bytes_s: float = 4.0e10
    """What each GPU sends in a ring over nodes: 400 Gbit/s a GPU at 80 %."""
    gpus_per_node: int = 8
    cores_per_gpu: float = 14.0
    """CPU cores beside each GPU that decode."""
    images_s_per_core: float = 700.0
    """Decoding, cropping and resizing of ImageNet photographs on one core; on two virtual ones, the S3
    server on them too, 1,531 a second were measured."""
    row_s: float = 6e-3
    """Of the feed's one driver for a row of micro-batches; 5.7 ms of a virtual core were measured."""
    snapshot_bytes_s: float = 5.0e9
    """From a GPU to pageable host memory."""
    storage_bytes_s: float = 1.0e9
    """From rank 0 to the object store."""
    gpu_failures_per_h: float = 2.0e-5
    """Interruptions of a GPU-hour: 419 in 54 days of 16,384 GPUs (Llama 3, 2024)."""
    restart_s: float = 120.0
    """From a failure to the next step: notice, start the group, read the checkpoint."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is trained."""

    model: ModelConfig
    batch: int = 4096
    micro_batch: int = 64
    epoch_images: int = 1_281_167
    epochs_between_checkpoints: float = 1.0
    window: int = 8192


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """One step on so many GPUs, in seconds, and the share of time that is left after failures."""

    num_gpus: int
    compute_s: float
    launch_s: float
    exposed_s: float
    """Of the all-reduce of gradients, what backward does not hide."""
    data_s: float
    """To decode a step's images on all cores; it hides behind the step."""
    feed_s: float
    """Of the one process that hands every row to its rank; it hides behind the step."""
    checkpoint_s: float
    """A step's share of the snapshots, which the step waits for, and of writing that outlasts the interval."""
    goodput: float
    bound: str

    @property
    def step_s(self) -> float:
        return max(self.compute_s, self.launch_s, self.data_s, self.feed_s) + self.exposed_s + self.checkpoint_s

    @property
    def images_s(self) -> float:
        """Not yet reduced by failures."""
        return self._images / self.step_s

    _images: int = 4096


def block_flops(width: int, tokens: int) -> float:
    """Multiplications and additions of one transformer block for one image, forward."""
    return 24 * width * width * tokens + 4 * width * tokens * tokens


def forward_flops(model: ModelConfig) -> float:
    """Of one image, where only visible patches enter the encoder and all tokens the decoder."""
    arch, patches = parse_arch(model.arch), model.num_patches
    pixels = arch.patch_px**2 * model.channels
    shown, decoder = model.num_visible, model.decoder_width
    encoder = 2 * shown * pixels * arch.width + arch.depth * block_flops(arch.width, shown + 1)
    embed = 2 * (shown + 1) * arch.width * decoder
    return (
        encoder
        + embed
        + model.decoder_depth * block_flops(decoder, patches + 1)
        + 2 * (patches - shown) * decoder * pixels
    )


def num_parameters(model: ModelConfig) -> int:
    """Weights that learn, to within a percent: blocks, patch embedding, and both ends of the decoder."""
    arch, decoder = parse_arch(model.arch), model.decoder_width
    pixels = arch.patch_px**2 * model.channels
    blocks = 12 * arch.depth * arch.width**2 + 12 * model.decoder_depth * decoder**2
    return blocks + pixels * arch.width + arch.width * decoder + pixels * decoder


def estimate(run: Run, cluster: Cluster, num_gpus: int) -> Estimate:
    """The step on so many GPUs. Backward is two thirds of the computation, and the all-reduce may hide behind it."""
    per_gpu = run.batch / num_gpus
    compute_s = 3 * forward_flops(run.model) * per_gpu / (cluster.matmul_flops_s * cluster.mfu)
    num_micro = math.ceil(per_gpu / run.micro_batch)
    blocks = parse_arch(run.model.arch).depth + run.model.decoder_depth
    launch_s = (num_micro * blocks * 60 + blocks * 4) * cluster.launch_s
    busy_s = max(compute_s, launch_s)

    comm_s = all_reduce_s(4 * num_parameters(run.model), cluster, num_gpus)
    hidden_s = 2 / 3 * busy_s / num_micro  # DDP sums in the last micro-batch's backward only
    exposed_s = max(0.0, comm_s - hidden_s)

    data_s = run.batch / (num_gpus * cluster.cores_per_gpu * cluster.images_s_per_core)
    feed_s = run.batch / images_per_row(run, num_gpus) * cluster.row_s
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


def images_per_row(run: Run, num_gpus: int) -> int:
    """Of a row of the feed: no more than a rank has of one window."""
    micro_batch = min(run.micro_batch, max(1, run.batch // num_gpus))
    height_px, width_px = run.model.image_px
    image_bytes = height_px * width_px * run.model.channels
    in_window = max(1, run.window // (num_gpus * micro_batch))
    return micro_batch * min(in_window, most_per_block(micro_batch * image_bytes, num_gpus))


def all_reduce_s(num_bytes: float, cluster: Cluster, num_gpus: int) -> float:
    """A ring within each node, and one over nodes by what a GPU has of the network."""
    if num_gpus == 1:
        return 0.0
    local = min(num_gpus, cluster.gpus_per_node)
    inside_s = 2 * (local - 1) / local * num_bytes / cluster.node_bytes_s
    nodes = math.ceil(num_gpus / cluster.gpus_per_node)
    # Each of a node's GPUs carries its share of the gradient over the network.
    between_s = 2 * (nodes - 1) / nodes * num_bytes / local / cluster.network_bytes_s
    return inside_s + between_s


MODELS = {
    "ViT-B/16": ModelConfig(arch="vit_base_patch16"),
    "ViT-L/16": ModelConfig(arch="vit_large_patch16"),
    "ViT-H/14": ModelConfig(arch="vit_huge_patch14"),
}
SIZES = (8, 64, 512)


def table(runs: dict[str, Run], cluster: Cluster, sizes: Sequence[int] = SIZES) -> str:
    """A row a model and size, in Markdown."""
    lines = [
        "| model | GPUs | images a GPU | arithmetic | launches | network, not hidden | decoding | feed "
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
    """The page docs/scaling.md."""
    cluster = Cluster()
    wide = Run(model=MODELS["ViT-L/16"], window=131_072)
    table_8 = {name: Run(model=model) for name, model in MODELS.items()}
    return f"""# Scaling on paper

Made by `python -m pipelines.bench.scaling > docs/scaling.md`; change the assumptions there and make it again. **Nothing
on this page was measured on more than one machine**: it says what to expect, and what to look at first
when it is not so.

Milliseconds a step of {4096:,} images, the recipe of Table 8, bfloat16, gradients in float32:

{table(table_8, cluster)}

- **arithmetic**: 3 x the forward pass's operations / (GPUs x {cluster.matmul_flops_s:.1e} FLOP/s x an MFU of \
{cluster.mfu:.0%}).
- **launches**: 60 kernels a block and micro-batch at {cluster.launch_s * 1e6:.0f} us. Where they exceed the \
arithmetic, a GPU waits for its host: compile, capture CUDA graphs, or use fewer GPUs or larger batches.
- **network**: a ring within the node ({cluster.node_bytes_s:.0e} bytes/s), one over nodes \
({cluster.network_bytes_s:.0e} bytes/s a GPU), less what the last micro-batch's backward hides.
- **decoding**: {cluster.cores_per_gpu:.0f} cores a GPU at {cluster.images_s_per_core:.0f} images/s; it bounds the \
step only where it exceeds the rest. Sources already shrunk, or several masks a decoded image, move it.
- **feed**: {cluster.row_s * 1e3:.0f} ms for each row that Ray Data's one driver hands to a rank; a row holds up to \
{images_per_row(table_8["ViT-L/16"], 8)} images for 8 GPUs, and what a rank has of a window of \
{table_8["ViT-L/16"].window:,} where there are many. **It is the first to bound large clusters**: there take a larger \
`data.window` (of 131,072 at 64 GPUs: {1000 * estimate(wide, cluster, 64).feed_s:.0f} ms); several feeds would lift it.
- **checkpoints**: weights and both moments, once an epoch, copied at {cluster.snapshot_bytes_s:.0e} bytes/s while the \
step waits, written at {cluster.storage_bytes_s:.0e} bytes/s while it does not.
- **after failures**: each GPU fails {cluster.gpu_failures_per_h:.0e} times an hour; half an interval between \
checkpoints and {cluster.restart_s:.0f} s are lost each time.

Steps, waits and recovery of a real run stand in MLflow as `goodput/*` and in its `result.json`: compare them.

## What was checked
- The operation counts equal those of the presets' headers (ViT-L: 124 GFLOP an image and step), by a test.
- Limits that any such model must keep (one GPU sends nothing, more GPUs never cost arithmetic), by tests.
- The cost of a row of the feed: two sizes of row, the same images, on one machine of two cores; not with many ranks.
- The loop around the step: `python -m pipelines.bench.loop_overhead` measures what it adds, interleaved.
"""


if __name__ == "__main__":
    print(page(), end="")
