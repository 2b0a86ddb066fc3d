"""Every point of a spool reaches the sink once and in order, whatever restarts and whatever is away meanwhile."""

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.registry import Point
from pipelines.runs.followers import MetricFollower, PictureFollower
from pipelines.runs.metrics import MetricSpool, read_points
from pipelines.runs.progress import ProgressDisplay
from pipelines.storage import Storage, open_storage
from tests.waiting import EVENT_DEADLINE_S, join, wait_until


class MemorySink:
    """A store of points that can be asked, as MLflow can, for the last step of each metric."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.num_waiting = 0

    def last_steps(self) -> dict[str, int]:
        steps: dict[str, int] = {}
        for point in self.points:
            steps[point.key] = max(point.step, steps.get(point.key, -1))
        return steps

    def log_points(self, points: Sequence[Point]) -> None:
        self.points.extend(points)

    def steps(self, key: str = "train/loss") -> list[int]:
        return [point.step for point in self.points if point.key == key]


@pytest.fixture
def storage(tmp_path) -> Storage:
    return open_storage(tmp_path / "run")


@pytest.fixture
def small_objects(monkeypatch):
    monkeypatch.setattr("pipelines.runs.metrics._OBJECT_BYTES", 400)


def spool_steps(storage: Storage, steps: Sequence[int], flush_every: int = 3) -> None:
    spool = MetricSpool(storage)
    for i, step in enumerate(steps):
        spool.add(step, {"train/loss": 1 / (1 + step), "lr": 0.1})
        if i % flush_every == 0:
            spool.flush()
    spool.close()


def follow(storage: Storage, sink: MemorySink) -> None:
    with MetricFollower(storage, sink, poll_every_s=60):
        pass


def test_every_point_arrives_with_its_values(storage):
    spool = MetricSpool(storage)
    spool.add(10, {"train/loss": 0.5, "lr": 1e-4})
    spool.add(20, {"train/loss": float("nan"), "val/top1": 71.5})
    spool.close()
    sink = MemorySink()
    follow(storage, sink)
    assert [(p.key, p.step) for p in sink.points] == [
        ("train/loss", 10),
        ("lr", 10),
        ("train/loss", 20),
        ("val/top1", 20),
    ]
    assert sink.points[0].value == 0.5
    assert sink.points[2].value != sink.points[2].value
    assert all(p.time_ms > 1_600_000_000_000 for p in sink.points)


def test_objects_are_named_by_their_first_step_and_few(storage, small_objects):
    spool_steps(storage, range(1, 41))
    names = [path for path, _ in storage.list("metrics")]
    assert names[0] == "metrics/000000000001.jsonl"
    assert names == sorted(names)
    for name in names:
        assert next(read_points(storage.read(name), name)).step == int(name[-18:-6])
    assert 5 < len(names) < 20


def test_nothing_is_written_by_a_rank_that_adds_nothing(storage):
    MetricSpool(storage).close()
    assert storage.list() == []


def test_adding_does_not_wait_for_the_storage(storage, monkeypatch):
    writing, release = threading.Event(), threading.Event()
    monkeypatch.setattr(Storage, "write", lambda *_: (writing.set(), release.wait(EVENT_DEADLINE_S)))
    spool = MetricSpool(storage)
    spool.add(1, {"lr": 1})
    flusher = threading.Thread(target=spool.flush)
    flusher.start()
    assert writing.wait(EVENT_DEADLINE_S)
    spool.add(2, {"lr": 1})
    assert flusher.is_alive()
    release.set()
    join(flusher)
    spool.close()


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_each_step_arrives_once_and_in_order_through_any_restarts(data, tmp_path_factory):
    """Ranks restart from any earlier step with any rhythm of flushes; drivers restart and poll at any time."""
    storage = open_storage(tmp_path_factory.mktemp("run"))
    sink, last = MemorySink(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.runs.metrics._OBJECT_BYTES", data.draw(st.integers(100, 900)))
        follower = MetricFollower(storage, sink)
        for _ in range(data.draw(st.integers(1, 5))):
            resumed = data.draw(st.integers(0, last))
            last = data.draw(st.integers(last, last + 30))
            spool_steps(storage, range(resumed + 1, last + 1), data.draw(st.integers(1, 9)))
            if data.draw(st.booleans()):
                follower = MetricFollower(storage, sink)
            if data.draw(st.booleans()):
                follower.poll()
        follow(storage, sink)
    assert sink.steps("train/loss") == list(range(1, last + 1))
    assert sink.steps("lr") == list(range(1, last + 1))


def test_a_restarted_driver_delivers_only_what_is_missing(storage, small_objects):
    sink = MemorySink()
    spool_steps(storage, range(1, 20))
    follow(storage, sink)
    spool_steps(storage, range(15, 30))
    follow(storage, sink)
    assert sink.steps() == list(range(1, 30))


def test_points_arrive_while_the_spool_grows(storage):
    sink, spool = MemorySink(), MetricSpool(storage)
    arrived = threading.Event()
    sink.log_points = lambda points: (sink.points.extend(points), arrived.set())[0]
    with MetricFollower(storage, sink, poll_every_s=0.01):
        for step in (1, 2, 3):
            spool.add(step, {"train/loss": 1})
            spool.flush()
            assert arrived.wait(EVENT_DEADLINE_S)
            arrived.clear()
    spool.close()
    assert sink.steps() == [1, 2, 3]


def test_points_stay_in_the_spool_while_too_many_wait_for_the_sink(storage, monkeypatch):
    sink = MemorySink()
    sink.num_waiting = 10**6
    spool_steps(storage, range(1, 5))
    answers, is_ready = [], MetricFollower.is_ready
    monkeypatch.setattr(MetricFollower, "is_ready", lambda self: (answers.append(is_ready(self)), answers[-1])[1])
    with MetricFollower(storage, sink, poll_every_s=0.01):
        wait_until(lambda: len(answers) > 3, "the follower to ask four times")
        assert not any(answers)
        assert sink.steps() == []
    assert sink.steps() == [1, 2, 3, 4]


def test_a_damaged_object_is_named(storage):
    spool_steps(storage, [1, 2])
    storage.write("metrics/000000000003.jsonl", b'{"step": 3, "time_ms": 1, "values": {}}\n{"step')
    with pytest.raises(ValueError, match=r"metrics/000000000003.jsonl is damaged at line 2"):
        follow(storage, MemorySink())


def test_what_the_sink_refuses_ends_the_follower_with_its_error(storage):
    sink = MemorySink()

    def refuse(points):
        raise ValueError("MLflow refused metric points")

    sink.log_points = refuse
    spool_steps(storage, [1])
    with pytest.raises(ValueError, match="refused"):
        follow(storage, sink)


def test_a_failed_run_keeps_its_own_error_and_still_delivers(storage):
    sink = MemorySink()
    spool_steps(storage, [1, 2])
    with pytest.raises(RuntimeError, match="worker"), MetricFollower(storage, sink, poll_every_s=60):
        raise RuntimeError("worker died")
    assert sink.steps() == [1, 2]


def points_at(step: int, seconds: float) -> list[Point]:
    values = {"train/loss": 0.25, "lr": 1.5e-4, "images_per_s": 1234.0}
    return [Point(key, value, step, int(1000 * seconds)) for key, value in values.items()]


def test_without_a_terminal_the_display_is_a_line(caplog, capsys):
    caplog.set_level("INFO", logger="pipelines")
    with ProgressDisplay("pretrain", 100) as display:
        display.show(points_at(10, 5))
        display.show(points_at(20, 10))
        display.show(points_at(100, 50))
    assert [r.message for r in caplog.records] == [
        "pretrain: step 10 of 100, loss 0.2500, lr 1.50e-04, 1,234 images/s",
        "pretrain: step 100 of 100, loss 0.2500, lr 1.50e-04, 1,234 images/s",
    ]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("no_color", [False, True])
def test_on_a_terminal_the_display_is_a_bar_on_stderr(monkeypatch, capsys, no_color):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    with ProgressDisplay("pretrain", 100) as display:
        display.show(points_at(10, 5))
        display.show(points_at(20, 10))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "20/100" in shown.err
    assert "0:00:40 left" in shown.err
    assert ("\x1b[38;5" in shown.err or "\x1b[3" in shown.err.replace("\x1b[38", "")) != no_color


class Album:
    """A picture sink that remembers what it was given, and refuses the first pictures."""

    def __init__(self, num_refused: int = 0) -> None:
        self.pictures: dict[str, bytes] = {}
        self.num_refused = num_refused

    def log_file(self, path: Path, folder: str = "") -> None:
        if self.num_refused:
            self.num_refused -= 1
            raise RuntimeError("MLflow refused the picture")
        self.pictures[f"{folder}/{path.name}"] = path.read_bytes()


def test_pictures_are_delivered_once_drawn_and_all_by_the_end(tmp_path: Path) -> None:
    storage, album = open_storage(tmp_path), Album()
    storage.write("pictures/one.png", b"1")
    with PictureFollower(storage, album, poll_every_s=0.01):
        wait_until(lambda: album.pictures, "the first picture")
        storage.write("pictures/two.png", b"2")
    assert album.pictures == {"pictures/one.png": b"1", "pictures/two.png": b"2"}


def test_a_refused_picture_is_delivered_later_and_reported_at_the_end_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    storage = open_storage(tmp_path)
    storage.write("pictures/one.png", b"1")
    album = Album(num_refused=1)
    with PictureFollower(storage, album, poll_every_s=0.01):
        wait_until(lambda: album.pictures, "the first picture")
    assert "pictures could not be delivered, retrying in 0.01 s: MLflow refused" in caplog.text
    with (
        pytest.raises(RuntimeError, match="MLflow refused"),
        PictureFollower(storage, Album(num_refused=1), poll_every_s=60),
    ):
        pass
