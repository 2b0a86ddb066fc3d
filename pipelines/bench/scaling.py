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
    """CPU time of a feed's coordinator per block; measured as 5.7 ms of a virtual core."""
    source_bytes_s: float = 1.0e10
    """Rate at which a node reads from storage: 100 Gbit/s at 80 %."""
    reduce_s: float = 5e-5
    """Latency of one all-reduce, whatever its size."""
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
    image_bytes: int = 110_000
    """Stored size of an image."""
    rows_per_group: int = 256
    window_per_gpu: int = 768
    """Samples of a shuffle window per GPU; at least 8,192 in all."""
    has_lanes: bool = True
    """Whether a window is shared out to lanes, so that a node reads only its own."""
    has_node_feeds: bool = True
    """Whether each node has a feed of its own, or one coordinator feeds all ranks."""
    gradient_bytes: int = 4
    """Bytes of a gradient as it is sent: 4 for float32, 2 for bfloat16."""
    bucket_mib: float = 25.0

    def window(self, num_gpus: int) -> int:
        return max(8192, self.window_per_gpu * num_gpus)


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
    read_s: float
    """Reading of a node's images from storage; it overlaps with the step."""
    feed_s: float
    """Work of the busiest process that hands blocks to ranks; it overlaps with the step."""
    checkpoint_s: float
    """The step's share of snapshots, for which it waits, and of writing beyond the checkpoint interval."""
    goodput: float
    """Share of time that remains after failures."""
    bound: str
    """What takes the largest share of the step."""

    @property
    def step_s(self) -> float:
        hidden_behind_s = max(self.compute_s, self.launch_s, self.data_s, self.read_s, self.feed_s)
        return hidden_behind_s + self.exposed_s + self.checkpoint_s

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
    arch = parse_arch(model.arch)
    return _num_parameters(arch.width, arch.depth, arch.patch_px**2 * model.channels, model)


def _num_parameters(width: int, depth: int, pixels: int, model: ModelConfig) -> int:
    decoder = model.decoder_width
    blocks = 12 * depth * width**2 + 12 * model.decoder_depth * decoder**2
    return blocks + pixels * width + width * decoder + pixels * decoder


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

    gradient_bytes = run.gradient_bytes * num_parameters(run.model)
    # Buckets are filled in float32, whatever is sent.
    buckets = max(1.0, 4 * num_parameters(run.model) / (run.bucket_mib * 2**20))
    comm_s = all_reduce_s(gradient_bytes, cluster, num_gpus) + (buckets * cluster.reduce_s if num_gpus > 1 else 0.0)
    hidden_s = 2 / 3 * busy_s / num_micro  # DDP reduces gradients in the last micro-batch's backward pass only.
    # The last bucket is full when the pass has ended.
    exposed_s = max(comm_s / buckets, comm_s - hidden_s)

    data_s = run.batch / (num_gpus * cluster.cores_per_gpu * cluster.images_s_per_core)
    nodes = math.ceil(num_gpus / cluster.gpus_per_node)
    read_s = run.batch / nodes * read_per_image(run, cluster, num_gpus) * run.image_bytes / cluster.source_bytes_s
    fed = run.batch / (nodes if run.has_node_feeds else 1)
    feed_s = fed / images_per_block(run, cluster, num_gpus) * cluster.block_s
    hidden_behind_s = max(busy_s, data_s, read_s, feed_s)
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
        "reading": read_s if read_s == hidden_behind_s else 0.0,
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
        read_s=read_s,
        feed_s=feed_s,
        checkpoint_s=checkpoint_s,
        goodput=goodput,
        bound=max(parts, key=lambda name: parts[name]),
        _images=run.batch,
    )


def read_per_image(run: Run, cluster: Cluster, num_gpus: int) -> float:
    """Count the stored images that a node reads for each that it trains on.

    It reads whole row groups, of which the first and last of a lane are partly its neighbours'. Without lanes, every
    node reads all images of a window.
    """
    nodes = math.ceil(num_gpus / cluster.gpus_per_node)
    return 1 + run.rows_per_group * nodes / run.window(num_gpus) if run.has_lanes or nodes == 1 else float(nodes)


def images_per_block(run: Run, cluster: Cluster, num_gpus: int) -> int:
    """Count the images in a block of the feed, at most one rank's share of a shuffle window."""
    micro_batch = min(run.micro_batch, max(1, run.batch // num_gpus))
    height_px, width_px = run.model.image_px
    image_bytes = height_px * width_px * run.model.channels
    in_window = max(1, run.window(num_gpus) // (num_gpus * micro_batch))
    ranks = min(num_gpus, cluster.gpus_per_node) if run.has_node_feeds else num_gpus
    return micro_batch * min(in_window, max_per_block(micro_batch * image_bytes, ranks))


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
        "| model | GPUs | images per GPU | arithmetic | launches | network, not hidden | decoding | reading | feed "
        "| checkpoints | step | images/s | after failures | bound by |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for name, run in runs.items():
        for size in sizes:
            found = estimate(run, cluster, size)
            milliseconds = [found.compute_s, found.launch_s, found.exposed_s, found.data_s, found.read_s, found.feed_s]
            cells = [f"{1000 * value:,.1f}" for value in (*milliseconds, found.checkpoint_s, found.step_s)]
            lines.append(
                f"| {name} | {size} | {run.batch // size} | {' | '.join(cells)} | {found.images_s:,.0f} "
                f"| {found.goodput:.2%} | {found.bound} |"
            )
    return "\n".join(lines)


def reduction(model: ModelConfig, cluster: Cluster, sizes: Sequence[int] = SIZES) -> str:
    """Format the network time that is not hidden, and the step, by type of the gradients and size of the buckets."""
    kinds = [(4, 25.0), (4, 100.0), (2, 25.0), (2, 100.0)]
    lines = [
        "| GPUs | " + " | ".join(f"{'float32' if of == 4 else 'bfloat16'}, {mib:.0f} MiB" for of, mib in kinds) + " |"
    ]
    lines.append("|--:|" + "--:|" * len(kinds))
    for size in sizes:
        found = [estimate(Run(model=model, gradient_bytes=of, bucket_mib=mib), cluster, size) for of, mib in kinds]
        cells = [f"{1e3 * one.exposed_s:.1f} of {1e3 * one.step_s:.1f}" for one in found]
        lines.append(f"| {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def memory() -> str:
    """Format the GPU memory of training, with every weight on every GPU and sharded over the 8 GPUs of a node."""
    lines = [
        "| model | parameters | weights, gradients, moments | activations of 64 images | sum | sharded over 8 |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, (width, depth, patch_px) in _SHAPES.items():
        model = MODELS["ViT-L/16"]
        tokens = (224 // patch_px) ** 2
        parameters = _num_parameters(width, depth, patch_px**2 * 3, model)
        state = 16 * parameters / 1e9
        visible = tokens // 4 + 1
        activations = visible * width * depth + (tokens + 1) * model.decoder_width * model.decoder_depth
        # 34 bytes for each value of a layer's input in 16 bits, without the attention matrices, which are not kept.
        held = 64 * 34 * activations / 1e9
        cells = [f"{size_gb:.1f} GB" for size_gb in (state, held, state + held, state / 8 + held)]
        lines.append(f"| {name} | {parameters / 1e6:,.0f} M | {' | '.join(cells)} |")
    return "\n".join(lines)


_SHAPES = {
    "ViT-B/16": (768, 12, 16),
    "ViT-L/16": (1024, 24, 16),
    "ViT-H/14": (1280, 32, 14),
    "2 B: 24 layers of 2,560, patch 14": (2560, 24, 14),
}
"""Width, depth and patch size of encoders; the decoder is that of MAE."""


def page() -> str:
    """Return the content of docs/scaling.md."""
    cluster = Cluster()
    table_8 = {name: Run(model=model) for name, model in MODELS.items()}
    large, before = table_8["ViT-L/16"], Run(model=MODELS["ViT-L/16"], has_node_feeds=False, window_per_gpu=1)
    whole = Run(model=MODELS["ViT-L/16"], has_lanes=False)
    return f"""# Scaling on paper

Generated by `python -m pipelines.bench.scaling > docs/scaling.md`; change the assumptions there and regenerate it.
**Nothing on this page was measured on more than one machine.** It states what to expect, and where to look first if a
run is slower.

Milliseconds per step of {4096:,} images, with the recipe of Table 8, bfloat16, gradients in float32, a feed on each \
node, and `data.window` and `data.lanes` as below:

{table(table_8, cluster)}

- **arithmetic**: 3 x the operations of the forward pass / (GPUs x {cluster.matmul_flops_s:.1e} FLOP/s x an MFU of \
{cluster.mfu:.0%}).
- **launches**: 60 kernels per transformer layer and micro-batch at {cluster.launch_s * 1e6:.0f} us. If they exceed \
the arithmetic, a GPU waits for its host: compile, capture CUDA graphs, or use fewer GPUs or larger batches.
- **network**: a ring within the node ({cluster.node_bytes_s:.0e} bytes/s) and one over nodes \
({cluster.network_bytes_s:.0e} bytes/s per GPU), less what the last micro-batch's backward pass hides; the last bucket \
is never hidden.
- **decoding**: {cluster.cores_per_gpu:.0f} cores per GPU at {cluster.images_s_per_core:.0f} images/s each. It bounds \
the step only if it exceeds the rest. Shrunk sources, or several masks per decoded image, reduce it.
- **reading**: images of {large.image_bytes / 1e3:.0f} kB at {cluster.source_bytes_s:.0e} bytes/s per node.
- **feed**: {cluster.block_s * 1e3:.0f} ms for each block that the coordinators of a node hand to its ranks. A block \
holds up to {images_per_block(large, cluster, 8)} images, and at most one rank's share of a shuffle window.
- **checkpoints**: weights and both moments, once per epoch, copied at {cluster.snapshot_bytes_s:.0e} bytes/s while \
the step waits, and written at {cluster.storage_bytes_s:.0e} bytes/s while it does not.
- **after failures**: each GPU fails {cluster.gpu_failures_per_h:.0e} times an hour. Each failure loses half a \
checkpoint interval and {cluster.restart_s:.0f} s.

Compare with the shares of a real run: `goodput/*` in MLflow, and `goodput` in its `result.json`.

## Options for many nodes
Set both once, before the first step: they decide the order of samples, and so belong to a run's identity.

- **`data.lanes`**: `batch / (micro_batch x GPUs per node)`, so 8 for 4,096 images in micro-batches of 64, and 64 in \
micro-batches of 8. A lane is a part of each step that draws on row groups of its own. Each node then reads only the \
row groups of its lanes, {read_per_image(large, cluster, 64):.3f} stored images for each that it trains on. With one \
lane it reads all of every window: ViT-L on 64 GPUs would read for {1e3 * estimate(whole, cluster, 64).read_s:.0f} ms \
a step. A number of lanes suits any number of nodes.
- **`data.window`**: {large.window_per_gpu} samples per GPU ({large.window(512):,} for 512), so that a rank's \
share of a window fills two blocks. As many tasks read it as there are nodes, \
{8 * large.window_per_gpu:,} images each. A larger window also [mixes better](data-sources.md#the-epoch-plan).

With one coordinator for all ranks, as before, and windows of 8,192, a step of ViT-L would wait for the feed for \
{1e3 * estimate(before, cluster, 64).feed_s:.0f} ms on 64 GPUs and \
{1e3 * estimate(before, cluster, 512).feed_s:,.0f} ms on 512.

## Limits of a feed on each node
- Ray Data 2.60 divides the CPUs of every node by the number of executions in the cluster, and rounds down. A feed has \
one execution, and two while one takes over from the other. Where nothing is left, an execution runs one data task at \
a time: with 112 cores on a node from about 100 executions on, so from 50 to 100 nodes. So data tasks of a group on \
several nodes request no CPU, and a limit keeps them to what fits beside the ranks. Only if nodes without ranks help, \
they do request CPUs, since Ray could not tell otherwise when a node is full. Such a cluster has this limit, which the \
table does not count: see there how long ranks wait (`goodput/data`).
- Two runs that share nodes, each on several of them: the later one makes its data as if workers held every CPU, with \
`compute.data_tasks` on each node. Otherwise each might hold the CPUs that a data task of the other waits for.

## Gradients
Milliseconds of ViT-H's step for which the network is not hidden, by `compute.reduce_in` and `compute.bucket_mib`:

{reduction(MODELS["ViT-H/14"], cluster)}

Larger buckets pay latency less often, and leave more to send after the backward pass. Sums in bfloat16 keep 8 bits of \
each gradient; no convergence run was made with them.

## Memory
GB per GPU: {16} bytes per parameter in float32, and activations in bfloat16:

{memory()}

All of these fit into 80 GB, so each GPU holds all weights (DDP). Sharding them (FSDP2) would send every weight twice \
more per micro-batch; others measured it 3 % slower at ViT-L. It begins to pay where weights and moments no longer \
leave room for a useful micro-batch: at about 4 B parameters (64 GB) on GPUs of 80 GB.

## What was checked
- The operation counts equal those in the presets' headers (ViT-L: 124 GFLOP per image and step), by a test.
- Limits that any such model must satisfy (one GPU sends nothing, more GPUs never add arithmetic), by tests.
- The cost of a block: 7.5 ms in the next section. This page assumes the 6 ms that were measured before.
- The loop around the step: `python -m pipelines.bench.loop_overhead` measures what it adds, interleaved.

## What the feed costs
`mae bench feed --nodes 1 2 4 8 --windows 32 --rounds 2`: eight raylets on one machine of two \
cores, blocks of 2 MiB for 8 ranks a node. CPU ms of a block, medians of two rounds, in which nothing else ran:

| feeds | nodes | blocks/s, if the busiest coordinator had a core | made on the rank's node | MiB over the network, a \
step | coordinators | raylets and GCS | data tasks | ranks |
|---|--:|--:|--:|--:|--:|--:|--:|--:|
| one | 1 | 121 | 11 % | 0.22 | 8.4 | 8.1 | 6.5 | 6.1 |
| one a node | 1 | 135 | 100 % | 0 | 7.5 | 2.6 | 6.2 | 6.0 |
| one | 2 | 140 | 11 % | 0.44 | 7.2 | 8.6 | 6.7 | 6.9 |
| one a node | 2 | 294 | 100 % | 0 | 6.7 | 2.5 | 5.5 | 5.0 |
| one | 4 | 207 | 14 % | 0.86 | 4.8 | 6.8 | 4.6 | 5.7 |
| one a node | 4 | 460 | 100 % | 0 | 8.4 | 3.5 | 6.5 | 5.7 |
| one | 8 | 170 | 12 % | 1.75 | 6.0 | 7.7 | 5.1 | 6.6 |
| one a node | 8 | 610 | 100 % | 0 | 12.5 | 5.8 | 7.7 | 7.5 |

One feed stays at 120 to 210 blocks/s. A feed a node grows with the nodes: 2.1 x as many at two nodes and 3.6 x at \
eight. It is less than eight times one node's, because eight coordinators share two cores here: each handed out the \
same 496 blocks in 51 s instead of 6 s, and while it waits, Ray Data's loop polls for about 5 % of a core. The first \
batch came after 20 s at 64 ranks, since eight executions started on two cores at once, and after 2.7 s at 8 ranks. \
Not measured: 16 nodes, and nodes with cores of their own.
"""


if __name__ == "__main__":
    print(page(), end="")
