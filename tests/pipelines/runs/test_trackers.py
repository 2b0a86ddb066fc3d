"""W&B, offline, and TensorBoard get each point of a run once and in order, and neither delays nor ends it."""

import struct
import threading
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import TrackingConfig
from pipelines.runs import trackers as module
from pipelines.runs.metrics import Evaluations, MetricSpool
from pipelines.runs.trackers import TrackerFollower, check_installed, tracking_elsewhere
from pipelines.storage import Storage, open_storage
from tests.waiting import EVENT_DEADLINE_S, wait_until

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63606060000000040001f61738550000"
    "000049454e44ae426082"
)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "run")


def spool(storage: Storage, *steps: int) -> None:
    found = MetricSpool(storage)
    for step in steps:
        found.add(step, {"train/loss": 1 / step, "lr": 0.1 * step})
    found.close()


class Notes:
    """A tracker that keeps what it was given, and fails as often as it is told to."""

    def __init__(self, num_failures: int = 0) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.pictures: list[tuple[int, str]] = []
        self.num_failures, self.is_closed = num_failures, False

    def log(self, step: int, time_ms: int, values: Mapping[str, float]) -> None:
        if len(self.logged) == 2 and self.num_failures:
            self.num_failures -= 1
            raise RuntimeError("quota exceeded")
        self.logged.append((step, dict(values)))

    def log_picture(self, step: int, path: str, content: bytes) -> None:
        self.pictures.append((step, path))

    def flush(self) -> None: ...

    def close(self) -> None:
        self.is_closed = True


def follow(storage: Storage, notes: Notes) -> None:
    with TrackerFollower("wandb", storage, lambda: notes):
        pass


def test_each_step_is_delivered_once_with_its_values_and_pictures_also_by_the_next_driver(storage: Storage) -> None:
    spool(storage, 1, 2)
    storage.write("pictures/reconstructions-0000000002.png", PNG)
    first, second = Notes(), Notes()
    follow(storage, first)
    assert first.logged == [(1, {"train/loss": 1.0, "lr": 0.1}), (2, {"train/loss": 0.5, "lr": 0.2})]
    assert first.pictures == [(2, "pictures/reconstructions-0000000002.png")]
    assert first.is_closed
    spool(storage, 3, 4)
    Evaluations(storage).add(2, {"evaluate/rankme": 9.0})
    follow(storage, second)
    assert [step for step, _ in second.logged] == [3, 4, 2]
    assert second.pictures == []


def test_after_an_error_delivery_goes_on_without_repeating(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_POLL_EVERY_S", 0.01)
    spool(storage, *range(1, 6))
    notes = Notes(num_failures=3)
    with TrackerFollower("wandb", storage, lambda: notes):
        wait_until(lambda: len(notes.logged) == 5, "all points")
    assert [step for step, _ in notes.logged] == [1, 2, 3, 4, 5]
    assert "could not be delivered to wandb, retrying in 0.01 s: quota exceeded" in caplog.text


def test_a_tracker_that_hangs_or_cannot_open_neither_delays_nor_fails_the_run(
    storage: Storage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_END_LIMIT_S", 0.05)
    spool(storage, 1)
    release = threading.Event()

    def hang() -> Notes:
        release.wait(EVENT_DEADLINE_S)
        raise OSError("no route to host")

    try:
        with TrackerFollower("wandb", storage, hang):
            pass
        assert "wandb did not take the last metrics within 0.05 s; the run ends without" in caplog.text
    finally:
        release.set()
    wait_until(lambda: "no route to host" in caplog.text, "the end of the thread")


def test_a_failed_run_keeps_its_own_error(storage: Storage) -> None:
    with pytest.raises(RuntimeError, match="worker died"), TrackerFollower("wandb", storage, Notes):
        raise RuntimeError("worker died")


def test_a_tracker_that_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed(TrackingConfig())
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"tracking.wandb needs the extra wandb; pip install '.\[wandb\]'"):
        check_installed(TrackingConfig(wandb="mae"))


def records(path: Path) -> Iterator[Any]:
    """Yield the records of W&B's file of an offline run, a log of blocks as LevelDB writes it."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    content, at, parts = path.read_bytes(), 7, b""
    assert content[:4] == b":W&B"
    while at + 7 <= len(content):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        checksum, size, kind = struct.unpack_from("<IHB", content, at)
        data = content[at + 7 : at + 7 + size]
        if len(data) < size:
            return  # It is being written.
        assert checksum == zlib.crc32(data, zlib.crc32(bytes([kind])))
        at, parts = at + 7 + size, parts + data
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


@pytest.mark.slow
def test_real_wandb_and_tensorboard_hold_every_point_once(
    storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    pytest.importorskip("wandb", reason="the extra wandb is absent; pip install '.[wandb]'")
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="the extra tensorboard is absent; pip install '.[tensorboard]'",
    )
    monkeypatch.setattr(module, "_END_LIMIT_S", 300.0)
    for key, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(key, value)
    config = TrackingConfig(wandb="mae", tensorboard=str(tmp_path / "tb"))
    storage.write("pictures/reconstructions-0000000002.png", PNG)
    for steps in ((1, 2), (3, 4)):
        spool(storage, *steps)
        with tracking_elsewhere(config, storage, "a", "0123abcd", {"epochs": 2}):
            pass
    events = accumulator.EventAccumulator(str(tmp_path / "tb" / "a"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [
        (step, pytest.approx(1 / step)) for step in (1, 2, 3, 4)
    ]
    (picture,) = events.Images("reconstructions")
    assert (picture.step, picture.encoded_image_string) == (2, PNG)
    files = sorted(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2, "one for each driver; `wandb sync` joins them by the run's id"
    # W&B's own process writes the file, and goes on after `finish`.
    wait_until(lambda: all(any(r.HasField("exit") for r in records(path)) for path in files), "the end of W&B's files")
    found = [record for path in files for record in records(path)]
    rows = [
        {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in r.history.item}
        for r in found
        if r.HasField("history")
    ]
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == [
        (step, pytest.approx(1 / step)) for step in (1, 2, 3, 4)
    ]
    assert len([row for row in rows if "reconstructions" in " ".join(row)]) == 1
    assert {record.run.run_id for record in found if record.HasField("run")} == {"0123abcd"}
