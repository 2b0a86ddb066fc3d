"""The `mae` commands: data to stdout, everything else to stderr, and the only sys.exit."""

import contextlib
import difflib
import io
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mae_core.bench.config import StepConfig
from pipelines.bench.config import RecipesConfig
from pipelines.config import (
    KINDS,
    PROBE,
    ClassifyConfig,
    DemoConfig,
    InspectConfig,
    PrepareConfig,
    PretrainConfig,
    ReconstructConfig,
    RegisterConfig,
    RunsConfig,
    SweepConfig,
    load_preset,
    to_dict,
)


@dataclass(frozen=True, kw_only=True)
class Command:
    """One `mae` command: what it takes and where its work is done."""

    help: str
    config: type | None
    run: Callable[["Invocation"], dict[str, Any]]
    positional: tuple[tuple[str, str], ...] = ()
    default: Any = None
    """Config in use where no preset is named; None for the defaults of its type."""


@dataclass(frozen=True, kw_only=True)
class Invocation:
    """A parsed command line."""

    command: str
    config: Any
    arguments: tuple[str, ...]
    preset: str
    json: bool
    fresh: bool


def _prepare(call: Invocation) -> dict[str, Any]:
    from pipelines.prepare import prepare

    manifest = prepare(call.arguments[0], call.arguments[1], call.config)
    return {
        "uri": call.arguments[1],
        "digest": manifest.digest,
        "num_found": manifest.num_found,
        "num_ok": manifest.num_ok,
        "num_quarantined": manifest.num_quarantined,
        "num_duplicates": manifest.num_duplicates,
        "reasons": dict(manifest.quarantine_reasons),
        "splits": {name: split.num_rows for name, split in manifest.splits.items()},
        "channels": manifest.channels,
        "classes": list(manifest.classes),
    }


def _inspect(call: Invocation) -> dict[str, Any]:
    from pipelines.inspect import inspect_uri

    return inspect_uri(call.arguments[0], call.config)


def _pretrain(call: Invocation) -> dict[str, Any]:
    from pipelines.pretrain import pretrain

    return pretrain(call.config, call.preset or "pretrain", fresh=call.fresh)


def _finetune(call: Invocation) -> dict[str, Any]:
    from pipelines.finetune import finetune

    return finetune(call.config, call.preset or "finetune", fresh=call.fresh)


def _probe(call: Invocation) -> dict[str, Any]:
    from pipelines.probe import probe

    return probe(call.config, call.preset or "probe", fresh=call.fresh)


def _sweep(call: Invocation) -> dict[str, Any]:
    from tune.sweep import sweep

    return sweep(call.config, call.preset or "sweep", fresh=call.fresh)


def _reconstruct(call: Invocation) -> dict[str, Any]:
    from pipelines import reconstruct

    return {"picture": str(reconstruct.run(call.config))}


def _register(call: Invocation) -> dict[str, Any]:
    from pipelines.pretrain import register

    return register(call.arguments[0], call.config)


def _runs(call: Invocation) -> dict[str, Any]:
    from pipelines.runs import runs

    return runs(call.arguments[0], call.config)


def _demo(call: Invocation) -> dict[str, Any]:
    from pipelines.demo import demo

    return demo(call.config, fresh=call.fresh)


def _doctor(call: Invocation) -> dict[str, Any]:
    from pipelines.doctor import doctor

    return doctor()


def _bench_step(call: Invocation) -> dict[str, Any]:
    from pipelines.bench.step import run

    return run(call.config)


def _bench_recipes(call: Invocation) -> dict[str, Any]:
    from pipelines.bench.recipes import run

    return run(call.config)


def _config(call: Invocation) -> dict[str, Any]:
    return {"kind": KINDS[type(call.config)], **to_dict(call.config)}


COMMANDS: dict[str, Command] = {
    "prepare": Command(
        help="Images become shards and a manifest.",
        config=PrepareConfig,
        run=_prepare,
        positional=(
            ("SOURCE", "folder or s3:// prefix of images, tars or Parquet, or a list of URIs"),
            ("OUT", "folder or s3:// prefix of the prepared dataset"),
        ),
    ),
    "inspect": Command(
        help="Counts, sizes, classes and a contact sheet of a source or a prepared dataset.",
        config=InspectConfig,
        run=_inspect,
        positional=(("URI", "source of images, or prepared dataset"),),
    ),
    "pretrain": Command(help="Shards become a pretrained, registered MAE.", config=PretrainConfig, run=_pretrain),
    "probe": Command(
        help="A linear probe measures a backbone's frozen features.",
        config=ClassifyConfig,
        run=_probe,
        default=PROBE,
    ),
    "finetune": Command(help="A registered backbone becomes a classifier.", config=ClassifyConfig, run=_finetune),
    "sweep": Command(help="Trials over mask ratio, decoder depth and more.", config=SweepConfig, run=_sweep),
    "reconstruct": Command(
        help="Pictures of masked images, reconstructions and originals.", config=ReconstructConfig, run=_reconstruct
    ),
    "register": Command(
        help="A checkpoint of a pretraining run becomes a model version.",
        config=RegisterConfig,
        run=_register,
        positional=(("RUN", "folder or URI of a pretraining run, RUN@STEP for one of its checkpoints"),),
    ),
    "runs": Command(
        help="Runs at a URI with state, step, last checkpoint and loss.",
        config=RunsConfig,
        run=_runs,
        positional=(("URI", "folder or s3:// prefix of one run or of many, such as runs"),),
    ),
    "demo": Command(help="The whole pipeline on an embedded sample, in minutes.", config=DemoConfig, run=_demo),
    "doctor": Command(
        help="What would be used (Ray, MLflow, storage), and whether it answers.", config=None, run=_doctor
    ),
    "bench step": Command(
        help="Training steps a second, beside the plain computation and transformers.",
        config=StepConfig,
        run=_bench_step,
    ),
    "bench recipes": Command(
        help="Linear probes of recipes that were given equal time.", config=RecipesConfig, run=_bench_recipes
    ),
    "config": Command(
        help="The whole config that a preset and overrides come to.",
        config=None,
        run=_config,
        positional=(("COMMAND", "pretrain, probe, finetune or sweep"),),
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command. Exit status 2 for what a user can mend, 1 for a run that failed."""
    sys.exit(_main(list(sys.argv[1:] if argv is None else argv)))


def _main(argv: list[str]) -> int:
    from pipelines.console import print_result, set_up_logging

    set_up_logging()
    try:
        call = parse(argv)
        # Ray's own warnings go to stdout, where only the result belongs.
        with contextlib.redirect_stdout(sys.stderr):
            result = COMMANDS[call.command].run(call)
    except (ValueError, OSError) as error:
        print(f"mae: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mae: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except RuntimeError as error:
        print(f"mae: failed: {_one_line(error)}", file=sys.stderr)
        return 1
    print_result(call.command, result, as_json=call.json)
    return 0


def parse(argv: Sequence[str]) -> Invocation:
    """The command and its config. Raises ValueError for what does not parse; exits with status 0 after --help."""
    rest = list(argv)
    if not rest or rest[0] in ("-h", "--help", "help"):
        print(_overview())
        raise SystemExit(0)
    name = rest.pop(0)
    if any(known.startswith(f"{name} ") for known in COMMANDS) and rest:
        name = f"{name} {rest.pop(0)}"
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"try one of {', '.join(COMMANDS)}"
        raise ValueError(f"unknown command {name!r}; {hint}")
    if name in ("finetune", "probe"):
        # What a classifier starts from is a registered model, as in `mae reconstruct --model`.
        rest = [re.sub(r"^--model(?==|$)", "--backbone", word) for word in rest]
    as_json, fresh = _take_switch(rest, "--json"), _take_switch(rest, "--fresh")
    wants_help = "-h" in rest or "--help" in rest
    arguments = () if wants_help else _take_positionals(rest, name)
    shown = arguments[0] if name == "config" and arguments else name
    if name == "config" and arguments and not _takes_preset(shown):
        raise ValueError(f"no config for {shown!r}; try one of {', '.join(filter(_takes_preset, COMMANDS))}")
    preset = _take_option(rest, "--preset") if _takes_preset(shown) else ""
    config = _parse_fields(name, COMMANDS[shown], preset, rest)
    _check_method(shown, config)
    return Invocation(command=name, config=config, arguments=arguments, preset=preset, json=as_json, fresh=fresh)


def _parse_fields(name: str, command: Command, preset: str, rest: list[str]) -> Any:
    """The config with defaults from the preset and fields from flags, read by tyro."""
    import tyro

    target = command.config or _NoFields
    default = load_preset(target, preset) if preset else command.default or target()
    text = io.StringIO()
    try:
        with contextlib.redirect_stderr(text):
            return tyro.cli(
                target, default=default, args=rest, prog=_usage(name), description=_describe(COMMANDS[name], target)
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ValueError(_tyro_in_words(text.getvalue(), name)) from None


@dataclass(frozen=True)
class _NoFields:
    """Takes no fields."""


def _takes_preset(name: str) -> bool:
    return name in COMMANDS and COMMANDS[name].config in (PretrainConfig, ClassifyConfig, SweepConfig)


def _check_method(name: str, config: Any) -> None:
    if name in ("probe", "finetune") and config.classifier.method != name:
        other = "finetune" if name == "probe" else "probe"
        raise ValueError(
            f"classifier.method is {config.classifier.method!r} but the command is {name}; try `mae {other}`"
        )


def _take_switch(rest: list[str], flag: str) -> bool:
    found = flag in rest
    rest[:] = [word for word in rest if word != flag]
    return found


def _take_option(rest: list[str], flag: str) -> str:
    """The value after `flag` (or `flag=value`), taken out of the words; empty where the flag is absent."""
    for i, word in enumerate(rest):
        if word.startswith(f"{flag}="):
            del rest[i]
            return word.split("=", 1)[1]
        if word == flag:
            if i + 1 == len(rest):
                raise ValueError(f"{flag} needs a name or a file; try {flag} vit_base")
            del rest[i]
            return rest.pop(i)
    return ""


def _take_positionals(rest: list[str], name: str) -> tuple[str, ...]:
    """The command's positional words, which come first."""
    wanted = COMMANDS[name].positional
    found = []
    while rest and not rest[0].startswith("-") and len(found) < len(wanted):
        found.append(rest.pop(0))
    if len(found) < len(wanted):
        missing, what = wanted[len(found)]
        raise ValueError(f"missing {missing}, the {what}; usage: {_usage(name)}")
    return tuple(found)


def _usage(name: str) -> str:
    return " ".join(["mae", name, *(word for word, _ in COMMANDS[name].positional)])


def _describe(command: Command, target: type) -> str:
    """What --help says above the fields: the switches that belong to the command, not to its config."""
    lines = [command.help, ""]
    lines += [f"  {word}: {what}." for word, what in command.positional]
    if target in (PretrainConfig, ClassifyConfig, SweepConfig):
        lines.append("  --preset NAME|FILE: a shipped preset or a YAML file; fields given as flags go on top of it.")
        lines.append("  --fresh: start again, where the same command would resume or print the finished result.")
        lines.append("  On resuming may change: output, name, data.uri, checkpoint, tracking and compute (but for")
        lines.append("  compute.precision); any other field makes it another run.")
    lines.append("  --json: one JSON object with the result on stdout.")
    return "\n".join(lines)


def _tyro_in_words(text: str, name: str) -> str:
    """tyro's box as one sentence, without its frame."""
    body = " ".join(re.sub("[│╭╰╮╯─]", " ", text).split())
    unknown = re.search(r"Unrecognized options: ([^,\s]+)", body)
    if unknown:
        near = re.search(r"Perhaps you meant: (--\S+)", body)
        hint = f"did you mean {near[1]}?" if near else f"`mae {name} --help` lists all"
        return f"unknown option {unknown[1]}; {hint}"
    sentence = re.sub(r" (Argument helptext|For full helptext).*", "", body)
    sentence = re.sub(r"^(Value error|Parsing error|Required options|Missing argument) ", "", sentence)
    sentence = re.sub(r"^Error parsing ([^:]+): ", lambda found: found[1] + ": " if "-" in found[1] else "", sentence)
    sentence = re.sub(r"invalid literal for int\(\) with base 10: (\S+)", r"\1 is not a whole number", sentence)
    sentence = re.sub(r"could not convert string to float: (\S+)", r"\1 is not a number", sentence)
    return sentence if "; try " in sentence else f"{sentence.rstrip('.')}; see `mae {name} --help`"


def _overview() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mae COMMAND [--preset NAME|FILE] [--dotted.field VALUE ...] [--json] [--fresh]",
            "",
            "Masked-autoencoder pretraining as a pipeline on Ray and MLflow.",
            "",
            *rows,
            "",
            "RAY_ADDRESS, MLFLOW_TRACKING_URI and AWS_ENDPOINT_URL decide what is used; without them all is local.",
            "`mae COMMAND --help` explains every field.",
        ]
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
