"""Options of `mae exporter`."""

from dataclasses import dataclass

from mae_core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ExporterConfig:
    """Metrics for Prometheus: state, rate, goodput, checkpoints of runs; images of datasets; registry events."""

    output: tuple[str, ...] = ("runs",)
    """Folders or s3:// prefixes of runs, as the --output of trainings."""
    datasets: tuple[str, ...] = ()
    """Prepared datasets, or folders or s3:// prefixes of several; those that are being prepared are counted, too."""
    host: str = "127.0.0.1"
    """Address to listen at. Nothing asks who reads: beyond this machine only in a private network."""
    port: int = 9400
    """Port to listen at."""
    every_s: float = 15.0
    """Seconds between two looks."""

    def __post_init__(self) -> None:
        if not self.output:
            raise UserError("output is empty; name the folder or prefix of the runs, such as s3://bucket/runs")
        if not 0 <= self.port < 65_536:
            raise UserError(f"port {self.port} is not between 0 and 65535; try 9400")
        if self.every_s <= 0:
            raise UserError(f"every_s {self.every_s:g} is not positive; try 15")
