"""The model on paper keeps the limits that any such model must, and the page is what the command makes."""

import dataclasses
from pathlib import Path

import pytest

from mae_core.model import build_mae
from pipelines.bench.scaling import Cluster, Run, all_reduce_s, estimate, forward_flops, num_parameters
from pipelines.bench.scaling_page import MODELS, page

DOC = Path(__file__).parents[3] / "docs" / "scaling.md"
RUN = Run(model=MODELS["ViT-L/16"])


def test_the_page_is_what_the_command_makes() -> None:
    assert DOC.read_text() == page(), "run `python -m pipelines.bench.scaling_page > docs/scaling.md`"


def test_operations_are_those_of_the_presets_headers() -> None:
    """vit_large.yaml: 254 exaFLOP for 1600 epochs of ImageNet-1K."""
    assert 3 * forward_flops(RUN.model) * 1600 * RUN.epoch_images == pytest.approx(254e18, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B/16"])
def test_parameters_are_the_models_to_a_percent(name: str) -> None:
    mae = build_mae(MODELS[name], seed=0)
    assert num_parameters(MODELS[name]) == pytest.approx(sum(p.numel() for p in mae.parameters()), rel=0.01)


def test_one_gpu_sends_nothing_and_a_ring_sends_each_byte_twice_at_most() -> None:
    cluster = Cluster()
    assert all_reduce_s(1e9, cluster, 1) == 0
    assert all_reduce_s(1e9, cluster, 8) < 2 * 1e9 / cluster.node_bytes_s
    assert all_reduce_s(1e9, cluster, 512) < 2 * 1e9 / cluster.node_bytes_s + 2 * 1e9 / 8 / cluster.network_bytes_s


def test_more_gpus_never_cost_arithmetic_and_always_cost_goodput() -> None:
    found = [estimate(RUN, Cluster(block_s=1e-5), size) for size in (8, 64, 512)]
    assert [e.compute_s for e in found] == sorted((e.compute_s for e in found), reverse=True)
    assert [e.images_s for e in found] == sorted(e.images_s for e in found)
    assert [e.feed_s for e in found] == sorted((e.feed_s for e in found), reverse=True)
    assert [e.goodput for e in found] == sorted((e.goodput for e in found), reverse=True)


@pytest.mark.parametrize(
    ("change", "bound"),
    [
        ({}, "arithmetic"),
        ({"images_s_per_core": 1.0}, "decoding"),
        ({"network_bytes_s": 1e8}, "the network"),
        ({"launch_s": 1e-3}, "kernel launches"),
        ({"snapshot_bytes_s": 1e6}, "checkpoints"),
        ({"block_s": 1.0}, "the feed"),
        ({"source_bytes_s": 1e6}, "reading"),
    ],
)
def test_what_is_made_scarce_bounds_the_step(change: dict[str, float], bound: str) -> None:
    assert estimate(RUN, dataclasses.replace(Cluster(), **{"block_s": 1e-5, **change}), 64).bound == bound


def test_the_feed_and_reading_bound_a_large_cluster_only_without_feeds_and_lanes_of_nodes() -> None:
    cluster = Cluster()
    for change, field in (({"has_node_feeds": False, "window_per_gpu": 1}, "feed_s"), ({"has_lanes": False}, "read_s")):
        found = [getattr(estimate(dataclasses.replace(RUN, **change), cluster, size), field) for size in (8, 64, 512)]
        assert found[-1] > 0.9 * found[0], change
    assert all(
        estimate(Run(model=m), cluster, size).bound != "the feed" for m in MODELS.values() for size in (8, 64, 512)
    )


def test_gradients_in_bfloat16_expose_less_of_the_network() -> None:
    float32, bfloat16 = (
        estimate(Run(model=MODELS["ViT-H/14"], gradient_bytes=size), Cluster(), 512) for size in (4, 2)
    )
    assert bfloat16.exposed_s < float32.exposed_s
    assert bfloat16.compute_s == float32.compute_s
