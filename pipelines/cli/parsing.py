"""Parse a command line to a command with its config; turn every parsing error into one sentence."""

import contextlib
import dataclasses
import difflib
import io
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import mae_core
from mae_core.errors import UserError
from pipelines.cli.commands import COMMANDS, Invocation
from pipelines.cli.exit_codes import ExitCode
from pipelines.config import ClassifyConfig, PretrainConfig, SweepConfig, load_preset, preset_fields

log = logging.getLogger(__name__)

# Commands that resume a run or show its result, unless --fresh starts another one.
_STARTING = ("pretrain", "probe", "finetune", "sweep", "demo")


_SWITCH = re.compile(r"--(?P<parents>([a-z_-]+\.)*compute\.)(?P<no>no-)?(?P<name>gpu|compile)")


def parse(argv: Sequence[str]) -> Invocation:
    """Return the command and its config; options may stand before, between and after the other words.

    Raises UserError for what does not parse; exits with status 0 after --help and --version.
    """
    rest = _command_first(argv)
    if not rest or rest[0] in ("-h", "--help", "help"):
        print(overview())
        raise SystemExit(0)
    if rest[0] in ("-V", "--version", "version"):
        print(f"mae-ray {mae_core.__version__}")
        raise SystemExit(0)
    name = _take_command(rest)
    foreign = _take_foreign(rest) if COMMANDS[name].takes_words else ()
    if name in ("pretrain", "finetune", "probe"):
        # What training starts from is a registered model, as in `mae reconstruct --model`.
        rest = [re.sub(r"^--model(?==|$)", "--backbone", word) for word in rest]
    rest = list(_with_values(rest))
    as_json, fresh = _take_switch(rest, "--json"), name in _STARTING and _take_switch(rest, "--fresh")
    estimates = name == "pretrain" and _take_switch(rest, "--estimate")
    price = _take_price(rest) if name == "pretrain" else None
    wants_help = "-h" in rest or "--help" in rest
    preset = _take_option(rest, "--preset") if name == "config" or _takes_preset(name) else ""
    shown = name if name != "config" or wants_help else _take_shown(rest)
    stated = _stated(rest) | frozenset(preset_fields(COMMANDS[shown].config or _NoFields, preset) if preset else ())
    arguments, config = _parse_fields(name, shown, preset, rest)
    _check_method(shown, config)
    return Invocation(
        command=name,
        config=config,
        arguments=foreign or arguments,
        preset=preset,
        json=as_json,
        fresh=fresh,
        stated=stated,
        estimates=estimates or price is not None,
        price=price,
    )


def _take_price(rest: list[str]) -> float | None:
    text = _take_option(rest, "--estimate-price", "2.5")
    try:
        return float(text) if text else None
    except ValueError:
        raise UserError(f"estimate-price {text!r} is no number; try the price of one GPU for an hour, 2.5") from None


def _with_values(words: Sequence[str]) -> Iterator[str]:
    """Yield the words with a value for every switch that may also be auto: --compute.no-gpu becomes gpu False."""
    for i, word in enumerate(words):
        found = _SWITCH.fullmatch(word)
        if not found:
            yield word
            continue
        yield f"--{found['parents']}{found['name']}"
        following = words[i + 1 : i + 2]
        if found["no"] or following not in (["auto"], ["True"], ["False"]):
            yield str(not found["no"])


def _stated(words: Sequence[str]) -> frozenset[str]:
    """Return the dotted names of the fields that the options set."""
    return frozenset(word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--"))


def _command_first(argv: Sequence[str]) -> list[str]:
    """Move --json, --fresh and --preset from before the command to after it."""
    rest, before = list(argv), []
    while rest and (rest[0] in ("--json", "--fresh") or rest[0].startswith("--preset=")):
        before.append(rest.pop(0))
    while len(rest) > 2 and rest[0] == "--preset":
        before += [rest.pop(0), rest.pop(0)]
    return rest + before


def _take_command(rest: list[str]) -> str:
    """Remove the command from the words and return it. Raises UserError with the nearest name if it does not exist."""
    name = rest.pop(0)
    if name.startswith("-"):
        first_words = {known.split()[0] for known in COMMANDS}
        command = next((word for word in rest if word in first_words), "COMMAND")
        raise UserError(f"option {name} stands before the command; try `mae {command} {name} ...`")
    if any(known.startswith(f"{name} ") for known in COMMANDS) and rest:
        name = f"{name} {rest.pop(0)}"
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"try one of {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {name!r}; {hint}")
    return name


def _take_foreign(rest: list[str]) -> tuple[str, ...]:
    """Remove the words of another command, which begin after -- or are all, and return them; leave one for tyro."""
    if "--" in rest:
        at = rest.index("--")
        words, rest[at:] = rest[at + 1 :], []
    elif rest and not rest[0].startswith("-"):
        words, rest[:] = rest[:], []
    else:
        words = []
    rest += ["COMMAND"] if words else []
    return tuple(words)


def _take_shown(rest: list[str]) -> str:
    """Remove from the words the command whose config `mae config` prints, and return it."""
    first = next((word for word in rest if not word.startswith("-")), "")
    shown = next(filter(_takes_preset, rest), first)
    if not shown:
        raise UserError(f"missing COMMAND, the {COMMANDS['config'].positional[0][1]}; usage: {_usage('config')}")
    if not _takes_preset(shown):
        raise UserError(f"no config for {shown!r}; try one of {', '.join(filter(_takes_preset, COMMANDS))}")
    rest.remove(shown)
    return shown


def _parse_fields(name: str, shown: str, preset: str, rest: list[str]) -> tuple[tuple[str, ...], Any]:
    """Let tyro read the positional words and the config, whose defaults are those of the preset."""
    import tyro

    target, words = COMMANDS[shown].config or _NoFields, [] if name == "config" else COMMANDS[name].positional
    default = _extension(preset, rest) if target is PretrainConfig else None
    if default is None:
        default = load_preset(target, preset) if preset else COMMANDS[shown].default or target()
        default = _with_scaled_warmup(default, rest)
    fields: list[Any] = [
        (word, Annotated[tyro.conf.Positional[str], tyro.conf.arg(help=what, metavar=word)]) for word, what in words
    ]
    fields.append(("config", Annotated[target, tyro.conf.arg(name="")], dataclasses.field(default=default)))
    text = io.StringIO()
    try:
        with contextlib.redirect_stderr(text):
            read = tyro.cli(
                dataclasses.make_dataclass("Words", fields),
                args=rest,
                prog=f"mae {name}",
                description=_describe(name, target),
            )
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UserError(_tyro_in_words(text.getvalue(), name)) from None
    config = read.config
    if isinstance(config, PretrainConfig) and config.extend:
        # By its URI, as the default has it, however the command line names the run.
        config = dataclasses.replace(config, extend=default.extend)
    return (shown,) if name == "config" else tuple(getattr(read, word) for word, _ in words), config


def _extension(preset: str, rest: Sequence[str]) -> PretrainConfig | None:
    """Return the config of the run that --extend or the preset names, with the preset's fields; None if neither does.

    Raises UserError if the run cannot be extended.
    """
    fields = preset_fields(PretrainConfig, preset) if preset else {}
    run = _take_option(list(rest), "--extend", "runs/mine") or fields.get("extend", "")
    if not run or "--help" in rest or "-h" in rest:
        return None
    from pipelines.drivers.extend import extension_of

    if epochs := _take_option(list(rest), "--epochs", "100"):
        fields["epochs"] = int(epochs) if re.fullmatch(r"-?\d+", epochs) else epochs
    output = _take_option(list(rest), "--output", "runs") or fields.get("output", "runs")
    return extension_of(run, fields, output)


def _with_scaled_warmup(default: Any, rest: Sequence[str]) -> Any:
    """Scale the default's warm-up with --epochs, if that is fewer than the warm-up's and no other warm-up is stated."""
    if not isinstance(default, PretrainConfig | ClassifyConfig) or "optim.warmup_epochs" in _stated(rest):
        return default
    found = re.search(r"(?:^| )--epochs[= ](\d+)(?: |$)", " ".join(rest))
    epochs, warmup = int(found[1]) if found else default.epochs, default.optim.warmup_epochs
    if not 0 < epochs < warmup:
        return default
    scaled = warmup * epochs / default.epochs
    log.info(
        "optim.warmup_epochs is scaled from %g to %g, since epochs are %d instead of %d",
        warmup, scaled, epochs, default.epochs,
    )  # fmt: skip
    return dataclasses.replace(default, optim=dataclasses.replace(default.optim, warmup_epochs=scaled))


@dataclass(frozen=True)
class _NoFields:
    """Takes no fields."""


def _takes_preset(name: str) -> bool:
    return name in COMMANDS and COMMANDS[name].config in (PretrainConfig, ClassifyConfig, SweepConfig)


def _check_method(name: str, config: Any) -> None:
    if name in ("probe", "finetune") and config.classifier.command != name:
        raise UserError(
            f"classifier.method is {config.classifier.method!r} but the command is {name}; "
            f"try `mae {config.classifier.command}`"
        )


def _take_switch(rest: list[str], flag: str) -> bool:
    found = flag in rest
    rest[:] = [word for word in rest if word != flag]
    return found


def _take_option(rest: list[str], flag: str, example: str = "vit_base") -> str:
    """Remove `flag VALUE` or `flag=VALUE` from the words and return the value; empty if the flag is absent."""
    for i, word in enumerate(rest):
        if word.startswith(f"{flag}="):
            del rest[i]
            return word.split("=", 1)[1]
        if word == flag:
            if i + 1 == len(rest):
                raise UserError(f"{flag} needs a value; try {flag} {example}")
            del rest[i]
            return rest.pop(i)
    return ""


def _usage(name: str) -> str:
    return " ".join(["mae", name, *(word for word, _ in COMMANDS[name].positional)])


def _describe(name: str, target: type) -> str:
    """Return the text of --help above the fields: the options of the command that are not in its config."""
    lines = [COMMANDS[name].help, ""]
    if name == "config":
        lines += [f"  {word}: {what}." for word, what in COMMANDS[name].positional]
    if target in (PretrainConfig, ClassifyConfig, SweepConfig) or name == "config":
        lines.append("  --preset NAME|FILE: a shipped preset or a YAML file; options override its fields.")
    if name in _STARTING:
        lines.append("  --fresh: start again instead of resuming a run or printing the result of a finished one.")
    if name == "pretrain":
        lines.append("  --estimate: measure steps for a minute; print what the run would take, and do not start it.")
        lines.append("  --estimate-price N: price of one GPU, or of one CPU core, for an hour, for the estimate.")
    if target in (PretrainConfig, ClassifyConfig, SweepConfig):
        lines.append("  Only output, name, data.uri, checkpoint, tracking, evaluate and compute (not its precision)")
        lines.append("  may change on resuming; a change of any other field makes it another run.")
    lines.append("  --json: print the result to stdout as one JSON object.")
    return "\n".join(lines)


def _tyro_in_words(text: str, name: str) -> str:
    """Rewrite the error box that tyro prints as one sentence, without its frame."""
    body = " ".join(re.sub("[│╭╰╮╯─|+]|-{3,}", " ", text).split())
    lacks = re.match(r"Required options Missing from [^:]+: (\w+)|Missing argument .*argument '(\w+)'", body)
    for word, what in COMMANDS[name].positional:
        if lacks and word in lacks.groups():
            return f"missing {word}, the {what}; usage: {_usage(name)}"
    unknown = re.search(r"Unrecognized options: ([^,\s]+)", body)
    if unknown and not unknown[1].startswith("-"):
        return f"unexpected {unknown[1]!r}; usage: {_usage(name)} [--option VALUE ...]"
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


def overview() -> str:
    """Return the text of `mae --help`: commands, environment variables and exit codes."""
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
            "RAY_ADDRESS, MLFLOW_TRACKING_URI and AWS_ENDPOINT_URL select the services; without them all is local.",
            "`mae COMMAND --help` explains every field; `mae --version` prints the version;",
            "`mae completion bash|zsh|fish` prints a script that completes commands and options in that shell.",
            "",
            "exit codes:",
            *(f"  {code:<{width}}  {code.meaning}" for code in ExitCode),
        ]
    )
