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


def test_the_papers_rate_for_pretraining():
    assert peak_lr(1.5e-4, 4096) == pytest.approx(2.4e-3)


def test_apply_lr_scales_the_rate_of_each_group():
    tensors = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": tensors[:1], "lr_scale": 0.25}, {"params": tensors[1:]}], lr=1.0)
    apply_lr(optimizer, 0.8)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.8]
