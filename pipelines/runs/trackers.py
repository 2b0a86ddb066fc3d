"""W&B and TensorBoard as trackers beside MLflow, which stays the registry.

A thread of the driver opens them and delivers what workers leave in the run folder. Nothing waits for it but the end of
the run, for a while; an error is logged, and never ends the run. `trackers/NAME.json` in the run folder says what was
delivered, so that the next driver of the run goes on from there.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Protocol

from mae_core.errors import UserError
from pipelines.config import TrackingConfig
from pipelines.registry.points import Point
from pipelines.runs.metrics import Evaluations, read_points
from pipelines.storage import Storage

log = logging.getLogger(__name__)

Name = Literal["wandb", "tensorboard"]

_POLL_EVERY_S = 5.0
_END_LIMIT_S = 60.0
"""Time for a tracker to take the last points, after which the run ends without it."""
_PICTURE = "reconstructions"


class Tracker(Protocol):
    """A place for metrics and pictures."""

    def log(self, step: int, time_ms: int, values: Mapping[str, float]) -> None:
        """Store the values of a step."""
        ...

    def log_picture(self, step: int, path: str, content: bytes) -> None:
        """Store a PNG file of a step."""
        ...

    def flush(self) -> None:
        """Write what was logged to where it survives this process."""
        ...

    def close(self) -> None:
        """Write everything and end."""
        ...


class WandbRun:
    """A run of Weights & Biases, which a later driver of the same run reopens.

    W&B's own variables decide where it goes: WANDB_API_KEY, WANDB_BASE_URL, WANDB_MODE=offline, WANDB_DIR.
    """

    def __init__(self, project: str, name: str, id: str, config: Mapping[str, Any]) -> None:
        import wandb

        settings = wandb.Settings(
            console="off", silent=True, disable_git=True, disable_code=True, x_disable_stats=True,
            finish_timeout=_END_LIMIT_S, finish_timeout_raises=True,
        )  # fmt: skip
        self._image = wandb.Image
        self._run = wandb.init(
            project=project, name=name, id=id, resume="allow", config=dict(config), settings=settings
        )
        # Evaluations arrive later than metrics of the same step, and W&B's own step only grows.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, time_ms: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step, "_timestamp": time_ms / 1000})

    def log_picture(self, step: int, path: str, content: bytes) -> None:
        import io

        from PIL import Image

        with Image.open(io.BytesIO(content)) as picture:
            self._run.log({_PICTURE: self._image(picture.convert("RGB"), caption=Path(path).name), "step": step})

    def flush(self) -> None:
        """Do nothing: W&B's own process has taken what was logged, and outlives this one."""

    def close(self) -> None:
        self._run.finish()


class EventFile:
    """An event file of TensorBoard in a folder of this machine, without importing TensorFlow or torch."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventFileWriter(str(folder))

    def log(self, step: int, time_ms: int, values: Mapping[str, float]) -> None:
        self._add(step, time_ms / 1000, [{"tag": key, "simple_value": value} for key, value in values.items()])

    def log_picture(self, step: int, path: str, content: bytes) -> None:
        import io

        from PIL import Image

        with Image.open(io.BytesIO(content)) as picture:
            width_px, height_px = picture.size
        image = {"width": width_px, "height": height_px, "colorspace": 3, "encoded_image_string": content}
        self._add(step, time.time(), [{"tag": _PICTURE, "image": image}])

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, time_s: float, values: Sequence[dict[str, Any]]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        self._writer.add_event(Event(wall_time=time_s, step=step, summary=Summary(value=values)))


class TrackerFollower:
    """Deliver a run's metrics, evaluations and pictures to a tracker on a thread while a block runs, the rest after.

    `open_tracker` is called on that thread, since it may take seconds. No error leaves the block.
    """

    def __init__(self, name: Name, storage: Storage, open_tracker: Callable[[], Tracker]) -> None:
        self._name, self._storage, self._open = name, storage, open_tracker
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._follow, name=f"{name}-follower", daemon=True)
        self._path = f"trackers/{name}.json"
        self._state: tuple[dict[str, int], list[str]] | None = None
        self._sizes: dict[str, int] = {}

    def __enter__(self) -> "TrackerFollower":
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._ending.set()
        self._thread.join(_END_LIMIT_S)
        if self._thread.is_alive():
            log.warning("%s did not take the last metrics within %g s; the run ends without", self._name, _END_LIMIT_S)

    def _follow(self) -> None:
        tracker: Tracker | None = None
        is_last = False
        while not is_last:
            is_last = self._ending.wait(_POLL_EVERY_S)
            try:
                tracker = tracker or self._open()
                self._deliver(tracker)
            except Exception as error:
                then = "it gets no more" if is_last else f"retrying in {_POLL_EVERY_S:g} s"
                log.warning("metrics could not be delivered to %s, %s: %s", self._name, then, error)
        try:
            if tracker is not None:
                tracker.close()
        except Exception as error:
            log.warning("%s could not be closed: %s", self._name, error)

    def _deliver(self, tracker: Tracker) -> None:
        """Deliver what is new, and note it, also if the tracker fails midway."""
        steps, pictures = self._delivered()
        before = json.dumps([steps, pictures])
        try:
            for prefix in ("metrics", Evaluations.PREFIX):
                for step, points in groupby(self._new_points(prefix, steps), lambda point: point.step):
                    found = list(points)
                    tracker.log(step, found[-1].time_ms, {point.key: point.value for point in found})
                    steps.update((point.key, step) for point in found)
            for path, _ in self._storage.list("pictures", suffix=".png"):
                if path not in pictures:
                    tracker.log_picture(_step_of(path), path, self._storage.read(path))
                    pictures.append(path)
        finally:
            if json.dumps([steps, pictures]) != before:
                tracker.flush()
                self._storage.write(self._path, json.dumps({"steps": steps, "pictures": pictures}).encode())

    def _new_points(self, prefix: str, last_steps: Mapping[str, int]) -> Iterator[Point]:
        """Yield the points after the last delivered step of each metric, in order, from objects that have grown."""
        for path, num_bytes in self._storage.list(prefix, suffix=".jsonl"):
            if self._sizes.get(path) != num_bytes:
                content = self._storage.read(path)
                for point in read_points(content, path):
                    if point.step > last_steps.get(point.key, -1):
                        yield point
                self._sizes[path] = len(content)

    def _delivered(self) -> tuple[dict[str, int], list[str]]:
        """Return the last delivered step of each metric, and the delivered pictures; both are kept up to date."""
        if self._state is None:
            known = json.loads(self._storage.read(self._path)) if self._storage.exists(self._path) else {}
            self._state = (known.get("steps", {}), known.get("pictures", []))
        return self._state


def check_installed(config: TrackingConfig) -> None:
    """Raise UserError if a tracker that the config names is not installed."""
    for name in ("wandb", "tensorboard"):
        if getattr(config, name) and find_spec(name) is None:
            raise UserError(f"tracking.{name} needs the extra {name}; pip install '.[{name}]', or leave it out")


@contextmanager
def tracking_elsewhere(
    config: TrackingConfig, storage: Storage, name: str, id: str, values: Mapping[str, Any]
) -> Iterator[None]:
    """Deliver the run's metrics to the trackers that the config names while the block runs.

    `id` is the run's own, by which W&B knows it, and `values` its config.
    """
    with ExitStack() as stack:
        if project := config.wandb:
            stack.enter_context(TrackerFollower("wandb", storage, lambda: WandbRun(project, name, id, values)))
        if folder := config.tensorboard:
            stack.enter_context(TrackerFollower("tensorboard", storage, lambda: EventFile(Path(folder) / name)))
        yield


def _step_of(path: str) -> int:
    """Return the step in a picture's name; 0 if it has none."""
    digits = "".join(c if c.isdigit() else " " for c in Path(path).stem).split()
    return int(digits[-1]) if digits else 0
