"""Find the MLflow to use, check that it responds, and find or create runs of one experiment in it."""

import logging
import os
import re
import sqlite3
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from mae_core.errors import UserError
from pipelines.registry.aliases import AliasHistory, Decision, move_alias, read_history
from pipelines.registry.inventory import RegistryCounts, count_registry
from pipelines.registry.outages import TrackingUnreachable, first_line, retry, without_credentials
from pipelines.registry.pruning import Garbage, Inventory, delete_garbage, find_garbage
from pipelines.registry.runs import Context, Kind, Run, first_tags
from pipelines.registry.versions import ModelRef, Step, fetch, find_by_alias, lineage, resolve

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import RunInfo

    from pipelines.dataset.manifest import Manifest

_ENVIRONMENT = {
    # MLflow's own 7 retries with exponential backoff take minutes; outages.py retries instead.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    # stdout is for results. MLflow's progress bars are not wanted anywhere.
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_UV_AUTO_DETECT": "false",
}
_PROBE_TIMEOUT_S = 4
_NAME = re.compile(r"[A-Za-z0-9][\w./@=+,-]{0,199}")


@dataclass(frozen=True)
class Tracking:
    """One experiment of an MLflow that responds. Create it with `open_tracking`."""

    uri: str
    """Tracking and registry URI. It may contain a password, so print `shown` instead."""
    experiment: str
    experiment_id: str
    client: "MlflowClient"

    @property
    def shown(self) -> str:
        """URI without credentials."""
        return without_credentials(self.uri)

    @property
    def ui_command(self) -> str:
        """How to see the runs: a command for a local file, a URL to open for a server."""
        if self.uri.startswith("sqlite:"):
            return f"mlflow ui --backend-store-uri {self.uri}"
        return f"open {self.shown}/#/experiments/{self.experiment_id}"

    def run(
        self,
        name: str,
        kind: Kind,
        config: dict[str, Any],
        *,
        tags: dict[str, str] | None = None,
        dataset: "Manifest | None" = None,
        dataset_uri: str = "",
        parent: Run | None = None,
        key: str = "",
        context: Context = "training",
    ) -> Run:
        """Find the experiment's run with this key (default: its name), or create it; mark it as running.

        A restarted driver passes the same key and gets the same run, which keeps the parameters of its first start.
        Training from step 0 needs a new key, or the points of the old run would count as its own.
        """
        check_run_name(name)
        found = self.find_run(key or name)
        if found is None:
            made = first_tags(key or name, kind, dataset, parent, tags or {})
            created = retry(lambda: self.client.create_run(self.experiment_id, tags=made, run_name=name), "the run")
            found = self._of(created.info)
        else:
            found.set_tags(tags or {})
        found.start(config, dataset, dataset_uri, context)
        return found

    def find_run(self, key: str) -> Run | None:
        """Return the run that was started with that key, if any, without changing it."""
        runs = retry(
            lambda: self.client.search_runs(
                [self.experiment_id],
                f"tags.`mae.run_key` = '{key}'",
                max_results=1,
                order_by=["attributes.start_time DESC"],
            ),
            "the search for a run",
        )
        return self._of(runs[0].info) if runs else None

    def has_finished(self, experiment: str, name: str) -> bool:
        """Return whether the experiment has a finished run of that name, whatever became of its folder."""
        check_run_name(name)
        found = retry(lambda: self.client.get_experiment_by_name(experiment), "the experiment")
        if found is None:
            return False
        query = f"attributes.run_name = '{name}' and attributes.status = 'FINISHED'"
        search = self.client.search_runs
        return bool(retry(lambda: search([found.experiment_id], query, max_results=1), "the search for a run"))

    def find_version(self, model_uri: str) -> ModelRef | None:
        """Return the version that models:/NAME@ALIAS means now; None if there is no such model or alias."""
        return find_by_alias(self.client, model_uri)

    def known_run(self, run_id: str) -> Run:
        """Return the run with that id without changing it."""
        return self._of(retry(lambda: self.client.get_run(run_id), "the run").info)

    def _of(self, info: "RunInfo") -> Run:
        return Run(self.client, id=info.run_id, name=info.run_name or "", experiment_id=self.experiment_id)

    def resolve(self, model_uri: str) -> ModelRef:
        """Return the version that models:/NAME@ALIAS or models:/NAME/VERSION means now.

        Raises UserError if there is none.
        """
        return resolve(self.client, model_uri)

    def fetch(self, ref: ModelRef, folder: Path) -> dict[str, Path]:
        """Download the version's files to `folder`, verified by sha256; return their paths by name.

        Raises UserError that names a file with other content.
        """
        return fetch(self.client, self.uri, ref, folder)

    def verify(self, ref: ModelRef) -> None:
        """Read all files of the version. Raises UserError that names one whose sha256 is not the registered one."""
        with TemporaryDirectory(prefix="mae-verify-") as scratch:
            fetch(self.client, self.uri, ref, Path(scratch))

    def history(self, name: str, alias: str) -> AliasHistory:
        """Read the moves of an alias of the model. Raises UserError if there is no such model."""
        return read_history(self.client, name, alias)

    def move_alias(self, history: AliasHistory, ref: ModelRef, decision: Decision) -> AliasHistory:
        """Point the alias to the version and return the new history.

        Raises AliasMoved, a UserError, if the alias was moved since the history was read.
        """
        return move_alias(self.client, history, ref, decision)

    def find_garbage(self, name: str, *, keep: int, older_than_days: float) -> Inventory:
        """List what nothing needs: versions of the model, or with an empty name of all models and broken uploads."""
        return find_garbage(self.client, name, keep=keep, older_than_days=older_than_days)

    def delete_garbage(self, garbage: Garbage) -> bool:
        """Delete a version or upload with its files; return whether it was still garbage."""
        return delete_garbage(self.client, self.uri, garbage)

    def lineage(self, model_uri: str) -> list[Step]:
        """Trace a model version back to the commit that pretrained its backbone."""
        return lineage(self.client, model_uri)


def check_run_name(name: str) -> None:
    """Raise UserError if a run may not have this name."""
    if not _NAME.fullmatch(name):
        raise UserError(
            f"run name {name!r} contains characters that an MLflow search cannot; try letters, digits, . _ / -"
        )


def open_tracking(experiment: str) -> Tracking:
    """Open the experiment in the MLflow of MLFLOW_TRACKING_URI, or in ./mae-mlflow; create it if it does not exist.

    Raises TrackingUnreachable, a UserError, within about ten seconds if the server does not respond.
    """
    uri = tracking_uri()
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # outages.py logs outages, once
    if not uri.startswith("sqlite:"):
        _probe(uri)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    # If mlflow was imported earlier, it read its log level before we set the variable.
    logging.getLogger("mlflow").setLevel(os.environ["MLFLOW_LOGGING_LEVEL"])
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    try:
        found = client.get_experiment_by_name(experiment)
        experiment_id = found.experiment_id if found else _create_experiment(client, uri, experiment)
    except (MlflowException, OSError) as error:
        raise TrackingUnreachable(
            f"MLflow at {without_credentials(uri)} cannot be used: {first_line(error)}; check its log, "
            "or unset MLFLOW_TRACKING_URI to use a local file"
        ) from error
    if found and found.lifecycle_stage != "active":
        raise UserError(
            f"experiment {experiment!r} was deleted; restore it with `mlflow experiments restore -x {experiment_id}` "
            "or choose another tracking.experiment"
        )
    return Tracking(uri, experiment, experiment_id, client)


def read_registry() -> RegistryCounts:
    """Count versions, aliases with their moves, and gates in the MLflow of MLFLOW_TRACKING_URI. Creates nothing.

    Raises TrackingUnreachable, a UserError, if it does not respond, or if it is a file that nobody has made yet.
    """
    uri = tracking_uri()
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    if uri.startswith("sqlite:"):
        _check_file(Path(uri.removeprefix("sqlite:///")))
    else:
        _probe(uri)
    from mlflow import MlflowClient

    return count_registry(MlflowClient(tracking_uri=uri, registry_uri=uri))


def _check_file(path: Path) -> None:
    """Raise TrackingUnreachable unless MLflow has finished making the file: two that make it at once fail."""
    from mlflow.store.db.utils import _get_latest_schema_revision

    found: list[tuple[str]] = []
    if path.is_file():
        with suppress(sqlite3.Error), closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            found = database.execute("SELECT version_num FROM alembic_version").fetchall()
    if found != [(_get_latest_schema_revision(),)]:
        raise TrackingUnreachable(
            f"there is no MLflow in {path} yet, or one of another version; the first run makes it"
        )


def tracking_uri() -> str:
    """Return the URI of the MLflow to use: a server's URL, or a sqlite file's absolute path. Contacts nothing.

    Raises UserError if MLFLOW_TRACKING_URI is neither.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI", "").strip()
    if not given:
        return f"sqlite:///{Path.cwd() / 'mae-mlflow' / 'mlflow.db'}"
    if given.startswith("sqlite:///"):
        return f"sqlite:///{Path(given.removeprefix('sqlite:///')).absolute()}"
    if urlsplit(given).scheme in ("http", "https") and urlsplit(given).hostname:
        return given.rstrip("/")
    raise UserError(
        f"MLFLOW_TRACKING_URI {without_credentials(given)!r} is neither a server nor a sqlite file; try "
        "http://HOST:5000 of an `mlflow server` (its backend store may be Postgres), or sqlite:////absolute/path/mlflow.db"
    )


def refuse_local_tracking(ray_address: str | None) -> None:
    """Raise UserError if MLflow is a local sqlite file while Ray runs on a remote cluster."""
    address = (ray_address or "").strip()
    host = urlsplit(address if "//" in address else f"//{address}").hostname or ""
    if address in ("", "local") or host in ("localhost", "::1") or host.startswith("127."):
        return
    if tracking_uri().startswith("sqlite:"):
        raise UserError(
            f"Ray runs at {address}, but MLflow is the local file {tracking_uri()}, which would be lost with the "
            "driver's machine; start `mlflow server` and set MLFLOW_TRACKING_URI to its http:// address"
        )


def _create_experiment(client: "MlflowClient", uri: str, name: str) -> str:
    """Create an experiment; return its id.

    Its artifacts are below MAE_ARTIFACTS, an s3:// prefix to which clients write without the server. Without it, a
    sqlite file gets an artifacts folder next to it, and a server has its own.
    """
    from mlflow.exceptions import MlflowException

    location = _direct_location(name)
    if location is None and uri.startswith("sqlite:"):
        location = str(Path(uri.removeprefix("sqlite:///")).parent / "artifacts")
    try:
        return client.create_experiment(name, artifact_location=location)
    except MlflowException:
        # Another driver may have created it since we looked.
        existing = client.get_experiment_by_name(name)
        if existing is None:
            raise
        return existing.experiment_id


def _direct_location(experiment: str) -> str | None:
    """Return the place of an experiment's artifacts below MAE_ARTIFACTS; None if that is not set."""
    root = os.environ.get("MAE_ARTIFACTS", "").strip()
    if not root:
        return None
    parts = urlsplit(root)
    if parts.scheme != "s3" or not parts.netloc or parts.username or parts.query:
        raise UserError(f"MAE_ARTIFACTS {without_credentials(root)!r} is no s3:// prefix; try s3://bucket/mlflow")
    return f"{root.rstrip('/')}/{re.sub(r'[^A-Za-z0-9._-]', '_', experiment)}"


def _probe(uri: str) -> None:
    """Check that the server responds with a status below 500. Raises TrackingUnreachable otherwise."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        response = http_request(
            get_default_host_creds(uri),
            "/health",
            "GET",
            max_retries=1,
            timeout=_PROBE_TIMEOUT_S,
            raise_on_status=False,
        )
        assert response is not None
        failure = f"responds with {response.status_code}" if response.status_code >= 500 else ""
    except (MlflowException, OSError) as error:
        failure = "does not respond" if "Max retries" in str(error) or "timeout" in str(error) else first_line(error)
    if failure:
        raise TrackingUnreachable(
            f"MLflow at {without_credentials(uri)} {failure}; start it, correct MLFLOW_TRACKING_URI, "
            "or unset it to use a local file"
        )
