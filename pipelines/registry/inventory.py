"""Count what the registry holds and what became of its aliases, for `mae exporter`. Reads only."""

from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from pipelines.registry.aliases import HISTORY_TAG, aliases_in, read_recorded
from pipelines.registry.versions import all_results

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

_PAGE = 200


@dataclass(frozen=True, kw_only=True)
class AliasMoves:
    """The recorded moves of one alias, of which the fields are those of the last."""

    model: str
    alias: str
    num_by_kind: dict[str, int]
    kind: str
    is_forced: bool
    moved_s: float
    """Unix seconds."""


@dataclass(frozen=True, kw_only=True)
class RegistryCounts:
    """What the registry holds at one moment."""

    num_versions: dict[str, int]
    """Versions of each registered model."""
    aliases: dict[tuple[str, str], int]
    """Version by model and alias."""
    moves: list[AliasMoves]
    gates: dict[str, int]
    """Runs of gates by verdict."""


def count_registry(client: "MlflowClient") -> RegistryCounts:
    """Count versions, aliases with their moves, and gates. Raises MLflow's error if it does not respond."""
    versions = Counter(
        v.name for v in all_results(lambda token: client.search_model_versions("", _PAGE, page_token=token))
    )
    aliases: dict[tuple[str, str], int] = {}
    moves: list[AliasMoves] = []
    for listed in all_results(lambda token: client.search_registered_models(None, _PAGE, page_token=token)):
        # The search leaves aliases out.
        model: RegisteredModel = client.get_registered_model(listed.name)
        aliases |= {(model.name, alias): int(version) for alias, version in model.aliases.items()}
        if run_id := model.tags.get(HISTORY_TAG):
            moves += [_moves(client, run_id, model.name, alias) for alias in aliases_in(client, run_id)]
        versions.setdefault(model.name, 0)
    return RegistryCounts(num_versions=dict(versions), aliases=aliases, moves=moves, gates=_gates(client))


def _moves(client: "MlflowClient", run_id: str, name: str, alias: str) -> AliasMoves:
    history = read_recorded(client, run_id, name, alias)
    last = history.moves[-1]
    return AliasMoves(
        model=name,
        alias=alias,
        num_by_kind=dict(Counter(move.kind for move in history.moves)),
        kind=last.kind,
        is_forced=last.forced,
        moved_s=datetime.fromisoformat(last.at).timestamp(),
    )


def _gates(client: "MlflowClient") -> dict[str, int]:
    experiments = [e.experiment_id for e in all_results(lambda token: client.search_experiments(page_token=token))]

    def search(token: str | None) -> Any:
        return client.search_runs(experiments, "tags.`mae.kind` = 'gate'", max_results=_PAGE, page_token=token)

    return (
        dict(Counter(run.data.tags.get("mae.verdict", "unknown") for run in all_results(search))) if experiments else {}
    )
