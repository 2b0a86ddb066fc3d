"""Analytical model of the training step on many GPUs: how long each part takes, and what bounds it."""

import math
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
    """CPU time of a feed's coordinator per block; measured as 5.7 and as 7.5 ms of a virtual core."""
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
    return count_parameters(arch.width, arch.depth, arch.patch_px**2 * model.channels, model)


def count_parameters(width: int, depth: int, pixels: int, model: ModelConfig) -> int:
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
