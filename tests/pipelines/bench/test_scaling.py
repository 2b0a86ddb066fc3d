"""The model on paper keeps the limits that any such model must, and the page is what the command makes."""

import dataclasses
from pathlib import Path

import pytest

from mae_core.model import build_mae
from pipelines.bench.scaling import MODELS, Cluster, Run, all_reduce_s, estimate, forward_flops, num_parameters, page

DOC = Path(__file__).parents[3] / "docs" / "scaling.md"
RUN = Run(model=MODELS["ViT-L/16"])


def test_the_page_is_what_the_command_makes() -> None:
    assert DOC.read_text() == page(), "run `python -m pipelines.bench.scaling > docs/scaling.md`"


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
    ],
)
def test_what_is_made_scarce_bounds_the_step(change: dict[str, float], bound: str) -> None:
    assert estimate(RUN, dataclasses.replace(Cluster(), **{"block_s": 1e-5, **change}), 64).bound == bound
