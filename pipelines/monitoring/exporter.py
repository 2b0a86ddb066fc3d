"""`mae exporter`: answer Prometheus with what run folders, datasets and the registry tell.

Each part has a thread that reads it again and again, so that a storage or an MLflow that does not respond delays only
its own part, and a scrape waits for none. What is exported is the last that was read, and when that was.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from prometheus_client.core import CollectorRegistry
from prometheus_client.exposition import start_http_server

from mae_core.errors import UserError
from pipelines import registry
from pipelines.config import ExporterConfig
from pipelines.interrupts import Interrupted
from pipelines.monitoring.datasets import DatasetCounts, count_datasets
from pipelines.monitoring.metrics import (
    Family,
    Read,
    dataset_families,
    exporter_families,
    registry_families,
    run_families,
)
from pipelines.runs.listing import Observation, observe_runs
from pipelines.storage import open_storage

log = logging.getLogger(__name__)


class Part(Protocol):
    """Something that is read as a whole."""

    name: str

    def read(self) -> list[Family]:
        """Return its metrics as they are now."""
        ...


class Runs:
    """The runs below some folders or prefixes. A run's name is its path below its folder, or its folder's own name."""

    name = "runs"

    def __init__(self, uris: Sequence[str]) -> None:
        self._known: dict[str, dict[str, Observation]] = {open_storage(uri).uri: {} for uri in uris}

    def read(self) -> list[Family]:
        named: dict[str, Observation] = {}
        for uri, known in self._known.items():
            found = observe_runs(uri, known)
            self._known[uri] = {observation.status.run: observation for observation in found}
            named |= {
                observation.status.run or uri.rstrip("/").rsplit("/", 1)[-1]: observation for observation in found
            }
        return list(run_families(named))


class Datasets:
    """The prepared datasets in some folders, or at some URIs."""

    name = "datasets"

    def __init__(self, uris: Sequence[str]) -> None:
        self._uris = uris
        self._known: dict[str, DatasetCounts] = {}

    def read(self) -> list[Family]:
        found = [counts for uri in self._uris for counts in count_datasets(uri, self._known)]
        self._known = {counts.dataset: counts for counts in found}
        return list(dataset_families(found))


class Registry:
    """The registry of MLFLOW_TRACKING_URI."""

    name = "registry"

    def read(self) -> list[Family]:
        return list(registry_families(registry.read_registry()))


class Exporter:
    """A collector for Prometheus' client library: the metrics of all parts as they were last read."""

    def __init__(self, parts: Sequence[Part], every_s: float) -> None:
        self._parts, self._every_s = parts, every_s
        self._families: dict[str, list[Family]] = {part.name: [] for part in parts}
        self._reads = {part.name: Read(time.time()) for part in parts}
        self._stop = threading.Event()

    def collect(self) -> Iterator[Family]:
        """Yield the metrics of every part, and when each was read."""
        for families in list(self._families.values()):
            yield from families
        yield from exporter_families(self._reads)

    def read_once(self, part: Part) -> None:
        """Read a part. If that fails, log the error, count it, and keep what was read before."""
        before = self._reads[part.name]
        try:
            self._families[part.name] = part.read()
            self._reads[part.name] = Read(time.time(), before.num_errors)
        except Exception as error:
            self._reads[part.name] = Read(before.read_s, before.num_errors + 1)
            log.warning("could not read the %s, retrying in %g s: %s", part.name, self._every_s, error)

    def start(self) -> None:
        """Read every part again and again, each on its own thread, until `stop`."""
        for part in self._parts:
            threading.Thread(target=self._keep_reading, args=(part,), name=f"read-{part.name}", daemon=True).start()

    def stop(self) -> None:
        """End the threads once each has read its part."""
        self._stop.set()

    def _keep_reading(self, part: Part) -> None:
        while not self._stop.is_set():
            self.read_once(part)
            self._stop.wait(self._every_s)


def export(config: ExporterConfig, wait: Callable[[], Any] | None = None) -> dict[str, Any]:
    """Answer at http://HOST:PORT/metrics until a signal, or until `wait` returns; return that URL.

    Raises UserError if the port is taken, and Interrupted after a signal.
    """
    parts: list[Part] = [Runs(config.output), Registry()]
    parts += [Datasets(config.datasets)] if config.datasets else []
    exporter, collectors = Exporter(parts, config.every_s), CollectorRegistry()
    collectors.register(exporter)
    try:
        server, thread = start_http_server(config.port, config.host, collectors)
    except OSError as error:
        raise UserError(f"{config.host}:{config.port} cannot be used ({error.strerror}); try another --port") from None
    url = f"http://{config.host}:{server.server_port}/metrics"
    log.info("metrics are at %s", url)
    exporter.start()
    try:
        (wait or threading.Event().wait)()
    except KeyboardInterrupt:
        raise Interrupted("stopped") from None
    finally:
        exporter.stop()
        server.shutdown()
        server.server_close()
        thread.join()
    return {"url": url}
