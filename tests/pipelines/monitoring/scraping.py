"""Scrape `mae exporter` while something else runs."""

import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from prometheus_client.parser import text_string_to_metric_families

from pipelines.bench.ports import free_port
from pipelines.config import ExporterConfig
from pipelines.monitoring.exporter import export
from tests.waiting import REQUEST_DEADLINE_S, join, wait_until

Seen = dict[str, dict[str, float]]
_READ = "mae_exporter_read_timestamp_seconds"


def looked_at(seen: Seen) -> dict[str, float]:
    """Return when the exporter has read each of its parts; 0 for one that it has not read yet."""
    return {part: seen.get(_READ, {}).get(part, 0.0) for part in ("runs", "datasets", "registry")}


@contextmanager
def scraped(*, output: str, datasets: str) -> Iterator[Seen]:
    """Run the exporter and scrape it while a block runs, and until it has read everything once more.

    Yield the newest value of every sample that was ever seen, by name and by the values of its labels.
    """
    port = free_port()
    config = ExporterConfig(output=(output,), datasets=(datasets,), port=port, every_s=0.5)
    seen: Seen = {}
    stop = threading.Event()

    def scrape() -> None:
        with (
            suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=REQUEST_DEADLINE_S) as answer,
        ):
            for family in text_string_to_metric_families(answer.read().decode()):
                for sample in family.samples:
                    labels = " ".join(value for _, value in sorted(sample.labels.items()))
                    seen.setdefault(sample.name, {})[labels] = sample.value

    def keep_scraping() -> None:
        while not stop.wait(0.2):
            scrape()

    members = [threading.Thread(target=export, args=(config, stop.wait)), threading.Thread(target=keep_scraping)]
    for member in members:
        member.start()
    try:
        yield seen
        # The first look may have begun before the block's end.
        for _ in range(2):
            before = looked_at(seen)
            wait_until(
                lambda before=before: all(at_s > before[part] for part, at_s in looked_at(seen).items()),
                "the exporter's next look",
            )
    finally:
        stop.set()
        for member in members:
            join(member)
