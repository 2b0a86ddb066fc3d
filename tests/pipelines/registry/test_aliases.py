"""Aliases that move only if nobody else moved them, with a history, on a real sqlite MLflow."""

import json
from collections.abc import Iterator

import pytest

from mae_core.errors import UserError
from pipelines.registry import AliasMoved, Decision, ModelRef, Tracking, check_alias, open_tracking, register_backbone
from pipelines.registry.aliases import move_alias, read_history
from tests.pipelines.registry.racing import check_race
from tests.services import has_postgres

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

Registered = tuple[Tracking, list[ModelRef]]


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registered]:
    """Three versions of mae-race. Each test moves an alias of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}")
        tracking = open_tracking("race")
        run = tracking.run("p", "pretrain", {})
        config = json.dumps({"kind": "backbone", "pixels": {"mean": [0.3], "std": [0.35]}}).encode()
        refs = [
            register_backbone(run, {"encoder.safetensors": bytes([i]), "config.json": config}, "mae-race")
            for i in range(3)
        ]
        run.finish()
        yield tracking, refs


def promotion(why: str = "") -> Decision:
    return Decision(kind="promote", why=why, figures={"gain": 1.5})


def pointed_to(tracking: Tracking, alias: str) -> int:
    return tracking.resolve(f"models:/mae-race@{alias}").version


@pytest.mark.slow
def test_of_promotions_at_once_one_wins_and_all_others_are_told_by_whom(registered: Registered) -> None:
    """Where Postgres is installed, test_on_postgres.py has the race of 50; elsewhere this one has it."""
    tracking, _ = registered
    check_race(tracking, "mae-race", "raced", 12 if has_postgres() else 50)


@pytest.mark.slow
def test_the_decision_is_tagged_and_recorded(registered: Registered) -> None:
    tracking, refs = registered
    history = tracking.history("mae-race", "champion")
    assert (history.version, history.moves) == (0, ())
    moved = tracking.move_alias(history, refs[1], promotion("best so far"))
    assert tracking.history("mae-race", "champion").moves[0].is_done
    (move,) = moved.moves
    assert (move.version, move.previous, move.why, move.figures) == (2, 0, "best so far", {"gain": 1.5})
    tags = tracking.resolve("models:/mae-race@champion").tags
    assert (tags["mae.champion.by"], tags["mae.champion.at"]) == (move.by, move.at)
    assert (tags["mae.champion.why"], tags["mae.champion.forced"]) == ("best so far", "false")
    assert json.loads(tags["mae.champion.figures"]) == {"gain": 1.5}
    facts = tracking.lineage("models:/mae-race@champion")[0].facts
    assert facts["champion.why"] == "best so far"


def test_who_decided_on_an_old_state_is_told_and_changes_nothing(registered: Registered) -> None:
    tracking, refs = registered
    old = tracking.history("mae-race", "old")
    tracking.move_alias(old, refs[0], promotion())
    with pytest.raises(AliasMoved, match=r"moved from no version to version 1 by .* meanwhile, so models:/mae-race/3"):
        tracking.move_alias(old, refs[2], promotion())
    assert pointed_to(tracking, "old") == 1
    assert len(tracking.history("mae-race", "old").moves) == 1


@pytest.mark.parametrize("step", ["set_registered_model_alias", "set_model_version_tag"])
def test_a_move_whose_process_died_is_completed_by_the_next_reader(
    registered: Registered, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    tracking, refs = registered
    alias = f"died-{step.split('_')[1]}"

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(tracking.client, step, killed)
        with pytest.raises(KeyboardInterrupt):
            tracking.move_alias(tracking.history("mae-race", alias), refs[1], promotion())
    with pytest.raises(UserError, match=f"no alias @{alias}"):
        pointed_to(tracking, alias)
    assert tracking.history("mae-race", alias).version == pointed_to(tracking, alias) == 2
    assert f"mae.{alias}.by" in tracking.resolve("models:/mae-race/2").tags


def test_a_late_process_that_overwrites_a_newer_move_puts_it_right(
    registered: Registered, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking, refs = registered
    set_alias = tracking.client.set_registered_model_alias
    overtaken = []

    def late(name: str, alias: str, version: str) -> None:
        if not overtaken:
            overtaken.append(True)
            move_alias(tracking.client, read_history(tracking.client, name, alias), refs[2], promotion("second"))
        set_alias(name, alias, version)

    monkeypatch.setattr(tracking.client, "set_registered_model_alias", late)
    tracking.move_alias(tracking.history("mae-race", "late"), refs[0], promotion("first"))
    assert pointed_to(tracking, "late") == 3
    assert [move.why for move in tracking.history("mae-race", "late").moves] == ["first", "second"]


def test_an_alias_that_was_moved_by_other_means_is_recorded(registered: Registered) -> None:
    tracking, refs = registered
    tracking.client.set_registered_model_alias("mae-race", "outside", "1")
    history = tracking.history("mae-race", "outside")
    assert [(move.kind, move.version) for move in history.moves] == [("outside", 1)]
    tracking.move_alias(history, refs[2], promotion())
    tracking.client.delete_registered_model_alias("mae-race", "outside")
    kinds = [(move.kind, move.version) for move in tracking.history("mae-race", "outside").moves]
    assert kinds == [("outside", 1), ("promote", 3), ("outside", 0)]


def test_rollbacks_walk_back_through_what_was_in_use(registered: Registered) -> None:
    tracking, refs = registered
    history = tracking.history("mae-race", "stack")
    for ref in refs:
        history = tracking.move_alias(history, ref, promotion())
    assert history.in_use == [1, 2, 3]
    history = tracking.move_alias(history, refs[1], Decision(kind="rollback"))
    assert history.in_use == [1, 2]
    history = tracking.move_alias(history, refs[2], promotion())
    assert history.in_use == [1, 2, 3]


@pytest.mark.parametrize(
    ("alias", "message"), [("candidate", "try --to champion"), ("latest", "none that"), ("v3", "none"), ("a/b", "none")]
)
def test_an_alias_that_mlflow_or_training_owns_is_refused(alias: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_alias(alias)
