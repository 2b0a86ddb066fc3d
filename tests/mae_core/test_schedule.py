from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mae_core.schedule import Schedule, apply_lr, peak_lr


@given(
    peak=st.floats(1e-5, 10),
    share=st.floats(0, 1),
    warmup=st.integers(0, 50),
    cosine=st.integers(1, 200),
)
def test_the_rate_rises_linearly_to_its_peak_and_falls_in_half_a_cosine_to_its_minimum(peak, share, warmup, cosine):
    schedule = Schedule(peak_lr=peak, min_lr=share * peak, warmup_steps=warmup, total_steps=warmup + cosine)
    rates = [schedule.lr(step) for step in range(warmup + cosine + 1)]
    assert rates[warmup] == pytest.approx(peak)
    assert rates[-1] == pytest.approx(share * peak)
    assert rates[: warmup + 1] == pytest.approx([peak * step / max(1, warmup) for step in range(warmup)] + [peak])
    assert all(high >= low - 1e-12 for high, low in zip(rates[warmup:], rates[warmup + 1 :]))
    assert rates[warmup + cosine // 2] + rates[warmup + cosine - cosine // 2] == pytest.approx(peak * (1 + share))


def constant(**changes):
    values = {"peak_lr": 4.0, "min_lr": 1.0, "warmup_steps": 4, "total_steps": 20, "decay_steps": 4}
    return Schedule(shape="constant", **(values | changes))


def test_a_constant_rate_is_warmed_up_held_and_decayed_as_1_minus_sqrt():
    rates = [constant().lr(step) for step in range(21)]
    assert rates[:5] == [0, 1, 2, 3, 4]
    assert rates[4:17] == [4] * 13
    assert rates[17:] == pytest.approx([1 + 3 * (1 - (k / 4) ** 0.5) for k in (1, 2, 3, 4)])
    assert rates[18] == pytest.approx(1.8786796564)
    assert rates[20] == 1


def test_without_a_decay_a_constant_rate_ends_at_its_peak():
    assert [constant(decay_steps=0).lr(step) for step in (4, 19, 20)] == [4, 4, 4]


def test_a_decay_may_be_all_that_follows_the_warm_up():
    rates = [constant(decay_steps=16).lr(step) for step in range(21)]
    assert rates[4] == 4
    assert all(high > low for high, low in pairwise(rates[4:]))
    assert rates[20] == 1


@given(
    shape=st.sampled_from(["cosine", "constant"]),
    first=st.integers(1, 1000),
    warmup=st.integers(0, 20),
    rest=st.integers(1, 50),
    decay=st.integers(0, 20),
)
def test_a_schedule_after_another_run_is_the_same_one_moved(shape, first, warmup, rest, decay):
    values = {"shape": shape, "peak_lr": 0.1, "min_lr": 1e-3, "warmup_steps": warmup, "decay_steps": min(decay, rest)}
    own = Schedule(**values, total_steps=warmup + rest)
    moved = Schedule(**values, total_steps=first + warmup + rest, first_step=first)
    assert [moved.lr(first + step) for step in range(warmup + rest + 1)] == [
        own.lr(step) for step in range(warmup + rest + 1)
    ]


@pytest.mark.parametrize("start", [0.0, 1.0, 4.0, 8.0])
def test_the_warm_up_after_another_run_starts_at_the_rate_at_which_it_ended(start):
    moved = constant(first_step=100, total_steps=120, start_lr=start)
    assert [moved.lr(100 + step) for step in range(5)] == [
        start + (4 - start) * share for share in (0, 0.25, 0.5, 0.75, 1)
    ]


def test_a_constant_rate_without_a_decay_is_the_beginning_of_a_longer_run():
    short, whole = constant(total_steps=10, decay_steps=0), constant(total_steps=30)
    rest = constant(total_steps=30, first_step=10, warmup_steps=0, start_lr=short.lr(10))
    rates = [short.lr(step) for step in range(10)] + [rest.lr(step) for step in range(10, 31)]
    assert rates == [whole.lr(step) for step in range(31)]


def test_the_papers_rate_for_pretraining():
    assert peak_lr(1.5e-4, 4096) == pytest.approx(2.4e-3)


def test_apply_lr_scales_the_rate_of_each_group():
    tensors = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": tensors[:1], "lr_scale": 0.25}, {"params": tensors[1:]}], lr=1.0)
    apply_lr(optimizer, 0.8)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.8]
