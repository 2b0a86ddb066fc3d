"""`mae bench feed`: what feeding itself costs as nodes are added, without decoding and training.

Every node is a raylet on this machine. Data tasks make blocks of pixels that nobody decoded, and ranks, threads of one
process per node, check ids, order and checksums. All nodes share the cores of this machine, so a rate by the clock says
little: the table has CPU seconds of each kind of process, and the rate at which the busiest process would be busy all
the time, if every process had a core of its own.
"""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
from numpy.typing import NDArray

from mae_core.config import AugmentConfig
from pipelines.bench.config import FeedBenchConfig
from pipelines.bench.object_store import environment
from pipelines.feed.blocks import SampleArrays
from pipelines.feed.building import RankFeed, feed
from pipelines.feed.plan import EpochPlan, Index
from pipelines.feed.segments import FeedSegment, Transform

log = logging.getLogger(__name__)

_MICRO_BATCH = 16
_PER_BLOCK = 64
"""Micro-batches of a block, which are as many as it may hold."""
_BLOCKS_PER_WINDOW = 2
_WARM_BLOCKS = 8
"""Blocks of each rank before measuring begins: meanwhile Ray replaces the idle processes that coordinators took."""
_STORE_BYTES = 512 * 2**20
_CLOCK_TICK_S = 0.01
"""Resolution of CPU seconds."""
_KINDS = {
    "SplitCoordinator": "coordinators",
    "_Node": "ranks",
    "raylet/raylet": "raylets",
    "gcs_server": "GCS",
    "Agent": "other",
    "Actor": "other",
}
"""Kinds of processes by what their command line holds; all others that run work for Ray are data tasks."""


class _MadeWindow:
    """A window whose images are whatever lies in memory, but for the id in the first bytes of each."""

    def __init__(self, segment: FeedSegment, window: int, ranks: Sequence[int] | None) -> None:
        import ray

        plan = self._plan = segment.plan
        wanted = set(ranks or range(plan.num_workers))
        self._found = [
            (step, index)
            for step in plan.window_steps(*divmod(window, plan.windows_per_epoch))
            for index in range(plan.micro_batches_per_step)
            if index % plan.num_workers in wanted
        ]
        height_px, width_px = segment.transform.image_px
        self.images_shape, self.images_dtype = (plan.micro_batch, height_px, width_px, 1), np.uint8
        self._node = _number_of(ray.get_runtime_context().get_node_id())

    def __len__(self) -> int:
        return len(self._found)

    def micro_batch(self, number: int, memory: NDArray[Any]) -> SampleArrays:
        step, index = self._found[number]
        ids = _ids_of(self._plan, step, index)
        memory.reshape(len(ids), -1)[:, :8] = ids.view(np.uint8).reshape(-1, 8)
        labels = np.full_like(ids, self._node)
        return SampleArrays(memory, ids, labels, np.ones(len(ids), np.float32), step, index)


class MadeSegment(FeedSegment):
    """Steps of a plan over images that nobody stored."""

    def open_window(self, window: int, ranks: Sequence[int] | None = None) -> Any:
        """Make a window, counted over all epochs; with `ranks`, only what these ranks train on."""
        return _MadeWindow(self, window, ranks)


def _ids_of(plan: EpochPlan, step: int, index: int) -> NDArray[np.int64]:
    """Return made ids of a micro-batch, all different."""
    return (step * plan.micro_batches_per_step + index) * plan.micro_batch + np.arange(plan.micro_batch)


def _number_of(node: str) -> int:
    return int(node[:15], 16)


def made_segment(num_workers: int, windows: int, block_bytes: float) -> MadeSegment:
    """Make a segment of `windows` shuffle windows, each with two blocks of `block_bytes` for every rank."""
    batch, steps = _MICRO_BATCH * num_workers, _PER_BLOCK * _BLOCKS_PER_WINDOW
    window = batch * steps
    groups = windows * window // _MICRO_BATCH
    index = Index(
        paths=("none",),
        shard=np.zeros(groups, np.int32),
        group=np.arange(groups, dtype=np.int32),
        first_id=np.arange(groups, dtype=np.int64) * _MICRO_BATCH,
        num_rows=np.full(groups, _MICRO_BATCH, np.int32),
    )
    plan = EpochPlan(
        index=index, seed=0, batch=batch, micro_batch=_MICRO_BATCH, num_workers=num_workers, window=window,
        lanes=num_workers,
    )  # fmt: skip
    side_px = max(4, round((block_bytes / _MICRO_BATCH / _PER_BLOCK) ** 0.5))
    transform = Transform(train=True, image_px=(side_px, side_px), channels=1, augment=AugmentConfig(), seed=0)
    return MadeSegment(dataset_uri="none", plan=plan, transform=transform, first_step=0, last_step=plan.steps_per_epoch)


class _Node:
    """A node's ranks: threads that take blocks and check them."""

    def __init__(self) -> None:
        import ray

        self._node = ray.get_runtime_context().get_node_id()
        self._threads: list[threading.Thread] = []
        self._firsts: list[threading.Event] = []
        self._firsts_s: list[float] = []
        self._go = threading.Event()
        self._found: list[dict[str, float]] = []
        self._errors: list[BaseException] = []

    def id(self) -> str:
        return self._node

    def build(self, segment: MadeSegment, max_tasks: int, groups: Sequence[Sequence[int]], near: bool) -> Any:
        """Build a feed for each group of ranks; return the part of every rank."""
        node = self._node if near else ""
        parts: dict[int, RankFeed] = {}
        for ranks in groups:
            workers = segment.plan.num_workers
            parts |= feed([segment], workers, max_tasks, 0 if near else 1, ranks=ranks, node=node).split()
        return parts

    def start(self, segment: MadeSegment, parts: dict[int, RankFeed]) -> float:
        """Start to read; return the seconds until every rank has its first block, once each has a few."""
        started_s = time.perf_counter()
        self._firsts_s = []
        self._go.clear()
        self._found, self._errors = [], []
        self._firsts = [threading.Event() for _ in parts]
        self._threads = [
            threading.Thread(target=self._read, args=(segment, rank, part, first), daemon=True)
            for (rank, part), first in zip(parts.items(), self._firsts)
        ]
        for thread in self._threads:
            thread.start()
        for first in self._firsts:
            first.wait()
        return max(self._firsts_s, default=0.0) - started_s

    def go(self) -> None:
        """Read on."""
        self._go.set()

    def finish(self) -> list[dict[str, float]]:
        """Wait until every rank has read all; return what each counted."""
        for thread in self._threads:
            thread.join()
        for error in self._errors:
            raise error
        return self._found

    def _read(self, segment: MadeSegment, rank: int, part: RankFeed, first: threading.Event) -> None:
        try:
            self._found.append(self._check(segment.plan, rank, part.blocks(), first))
        except BaseException as error:
            self._errors.append(error)
        finally:
            first.set()

    def _check(
        self, plan: EpochPlan, rank: int, blocks: Iterator[pa.Table], first: threading.Event
    ) -> dict[str, float]:
        """Compare every block with the plan; return counts, and the longest wait for a block."""
        expected = ((step, index) for step in range(plan.steps_per_epoch) for index in _indices(plan, rank))
        number, local, longest_s, arrived_s = 0, 0, 0.0, 0.0
        for block in blocks:
            now_s = time.perf_counter()
            if number > _WARM_BLOCKS:
                longest_s = max(longest_s, now_s - arrived_s)
            values = {name: block[name].combine_chunks().flatten().to_numpy() for name in ("step", "index", "ids")}
            for step, index, ids in zip(values["step"], values["index"], values["ids"].reshape(-1, plan.micro_batch)):
                assert (step, index) == next(expected), f"rank {rank} got step {step}, micro-batch {index}"
                assert (ids == _ids_of(plan, step, index)).all(), f"rank {rank} got other samples at step {step}"
            images = block["images"].combine_chunks().flatten().to_numpy().reshape(len(values["ids"]), -1)
            assert (images[:, :8].copy().view(np.int64)[:, 0] == values["ids"]).all(), "the images are of other samples"
            local += block["labels"].combine_chunks().flatten()[0].as_py() == _number_of(self._node)
            number += 1
            if number == 1:
                self._firsts_s.append(now_s)
            if number == _WARM_BLOCKS:
                first.set()
                self._go.wait()
            arrived_s = time.perf_counter()
        assert next(expected, None) is None, f"the feed of rank {rank} ended early"
        return {"blocks": number, "local": local, "longest_s": longest_s}


def _indices(plan: EpochPlan, rank: int) -> range:
    return range(rank, plan.micro_batches_per_step, plan.num_workers)


@dataclass(frozen=True)
class Round:
    """One design with one number of nodes, once."""

    blocks: int
    """Blocks that were measured, of all ranks."""
    local: float
    """Share of blocks that were made on the node of their rank."""
    build_s: float
    first_s: float
    """Seconds until every rank had its first block, from when the feed was built."""
    wall_s: float
    longest_s: float
    """The longest that a rank waited for a block."""
    cpu_s: dict[str, float]
    """CPU seconds by kind of process, while these blocks came."""
    busiest_s: float
    """CPU seconds of the busiest coordinator."""


@contextmanager
def raylets(num_nodes: int) -> Iterator[Any]:
    """Start a head without CPUs and `num_nodes` raylets with one CPU each, and connect to them."""
    from ray.cluster_utils import Cluster

    from pipelines.cluster import children_from_now, connect, own_sessions, shut_down

    quiet = {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    quiet |= {"RAY_enable_metrics_collection": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    with environment(quiet):
        node, started = {"include_dashboard": False, "object_store_memory": _STORE_BYTES}, children_from_now()
        try:
            with own_sessions():
                cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **node})
                for _ in range(num_nodes):
                    cluster.add_node(num_cpus=1, object_store_memory=_STORE_BYTES)
            cluster.wait_for_nodes()
            connect(address=cluster.address, logging_level=logging.ERROR, log_to_driver=False)
            yield cluster
        finally:
            shut_down(started())


def run(config: FeedBenchConfig) -> dict[str, Any]:
    """Measure; return the numbers, and a table of them in `text`."""
    found: dict[tuple[str, int], list[Round]] = defaultdict(list)
    with raylets(max(config.nodes)):
        nodes = _start_nodes(max(config.nodes))
        for number in range(-1, config.rounds):  # The first only starts processes.
            for count in config.nodes:
                for design in config.designs:
                    one = _measure(config, design, nodes[:count])
                    log.info("round %d, %d nodes, one feed per %s: %s", number, count, design, one)
                    if number >= 0:
                        found[design, count].append(one)
    rows = [_figures(design, count, config, rounds) for (design, count), rounds in found.items()]
    return {"rows": rows, "text": "\n".join(_table(rows, config))}


def _start_nodes(count: int) -> list[Any]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ids = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")][:count]
    there = [NodeAffinitySchedulingStrategy(node, soft=False) for node in ids]
    remote: Any = ray.remote(_Node)
    nodes = [remote.options(num_cpus=0, scheduling_strategy=node).remote() for node in there]
    ray.get([node.id.remote() for node in nodes])
    return nodes


def _measure(config: FeedBenchConfig, design: str, nodes: Sequence[Any]) -> Round:
    import ray

    per_node = config.ranks_per_node
    segment = made_segment(len(nodes) * per_node, config.windows, config.block_mib * 2**20)
    mine = [range(i * per_node, (i + 1) * per_node) for i in range(len(nodes))]
    started_s = time.perf_counter()
    if design == "cluster":
        parts = ray.get(nodes[0].build.remote(segment, len(nodes), [range(len(nodes) * per_node)], False))
    else:
        groups = [[ranks] if design == "node" else [[rank] for rank in ranks] for ranks in mine]
        built = ray.get([node.build.remote(segment, 1, of, True) for node, of in zip(nodes, groups)])
        parts = {rank: part for of in built for rank, part in of.items()}
    built_s = time.perf_counter()
    shares = [{rank: parts[rank] for rank in ranks} for ranks in mine]
    firsts_s = ray.get([node.start.remote(segment, share) for node, share in zip(nodes, shares)])
    before, went_s = _cpu_by_process(), time.perf_counter()
    ray.get([node.go.remote() for node in nodes])
    counted = [rank for ranks in ray.get([node.finish.remote() for node in nodes]) for rank in ranks]
    wall_s, after = time.perf_counter() - went_s, _cpu_by_process()
    cpu_s: dict[str, float] = defaultdict(float)
    busiest_s = 0.0
    for process, (kind, seconds) in after.items():
        spent_s = seconds - before.get(process, ("", 0.0))[1]
        cpu_s[kind] += spent_s
        busiest_s = max(busiest_s, spent_s if kind == "coordinators" else 0.0)
    blocks = int(sum(rank["blocks"] for rank in counted))
    return Round(
        blocks=blocks - _WARM_BLOCKS * len(counted),
        local=sum(rank["local"] for rank in counted) / blocks,
        build_s=built_s - started_s,
        first_s=max(firsts_s),
        wall_s=wall_s,
        longest_s=max(rank["longest_s"] for rank in counted),
        cpu_s=dict(cpu_s),
        busiest_s=busiest_s,
    )


def _cpu_by_process() -> dict[int, tuple[str, float]]:
    """Return kind and CPU seconds of every process that this one started, by its id."""
    found: dict[int, tuple[str, float]] = {}
    for process in psutil.Process().children(recursive=True):
        try:
            command, times = " ".join(process.cmdline()), process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        worker = "data tasks" if command.startswith("ray::") else "other"
        kind = next((kind for part, kind in _KINDS.items() if part in command), worker)
        found[process.pid] = kind, times.user + times.system
    return found


def _figures(design: str, count: int, config: FeedBenchConfig, rounds: list[Round]) -> dict[str, Any]:
    """Return the medians; `network_mib` is what crosses the network in a step, in which each rank has a micro-batch."""
    kinds = sorted({kind for one in rounds for kind in one.cpu_s})
    num_ranks = count * config.ranks_per_node
    return {
        "design": design,
        "nodes": count,
        "ranks": num_ranks,
        "blocks": rounds[0].blocks,
        "blocks_per_s": median(one.blocks / max(one.busiest_s, _CLOCK_TICK_S) for one in rounds),
        "wall_blocks_per_s": median(one.blocks / one.wall_s for one in rounds),
        "local": median(one.local for one in rounds),
        "network_mib": median(1 - one.local for one in rounds) * num_ranks * config.block_mib / _PER_BLOCK,
        "first_s": median(one.first_s for one in rounds),
        "longest_s": median(one.longest_s for one in rounds),
        "cpu_ms": {kind: median(1e3 * one.cpu_s.get(kind, 0.0) / one.blocks for one in rounds) for kind in kinds},
    }


def _table(rows: list[dict[str, Any]], config: FeedBenchConfig) -> Iterator[str]:
    """Yield the lines of the table, and the ratios of the designs to the first one."""
    yield f"blocks of {config.block_mib:g} MiB to {config.ranks_per_node} ranks a node; CPU ms a block by process"
    kinds = ("coordinators", "raylets", "GCS", "data tasks", "ranks")
    yield f"{'one feed per':>12} {'nodes':>5} {'ranks':>5} {'blocks/s':>9}  local  net MiB  first s " + " ".join(
        f"{kind:>12}" for kind in kinds
    )
    for row in rows:
        yield (
            f"{row['design']:>12} {row['nodes']:>5} {row['ranks']:>5} {row['blocks_per_s']:>9.0f} {row['local']:>6.0%} "
            f"{row['network_mib']:>8.2f} {row['first_s']:>8.2f} "
            + " ".join(f"{row['cpu_ms'].get(kind, 0.0):>12.2f}" for kind in kinds)
        )
    first = {row["nodes"]: row["blocks_per_s"] for row in rows if row["design"] == config.designs[0]}
    for row in rows:
        if row["design"] != config.designs[0]:
            ratio = row["blocks_per_s"] / first[row["nodes"]]
            yield f"{row['nodes']} nodes: one feed per {row['design']} has {ratio:.1f} x {config.designs[0]}'s blocks/s"
    yield "blocks/s: at which the busiest coordinator would be busy all the time; net MiB: over the network, each step"
