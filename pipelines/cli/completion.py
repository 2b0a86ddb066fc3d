"""Shell scripts that complete the commands and options of `mae` in bash, zsh and fish.

A script contains all words, so that completion does not start Python.
"""

import dataclasses
import typing
from collections.abc import Iterator, Mapping

from mae_core.errors import UserError

SHELLS = ("bash", "zsh", "fish")


def completion(shell: str, commands: Mapping[str, type | None]) -> str:
    """Return the script for a shell. `commands` maps each command to its config. Raises UserError for other shells."""
    if shell not in SHELLS:
        raise UserError(f"no completion for {shell!r}; try one of {', '.join(SHELLS)}")
    words = {name: ("--help", "--json", *options_of(config)) for name, config in commands.items()}
    return _fish(words) if shell == "fish" else _bash(words, zsh=shell == "zsh")


def options_of(config: type | None, prefix: str = "--") -> Iterator[str]:
    """Yield the flags of a config's fields, as tyro names them."""
    if config is None:
        return
    hints = typing.get_type_hints(config)
    for field in dataclasses.fields(config):
        name, kind = field.name.replace("_", "-"), hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from options_of(typing.cast(type, kind), f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"
        if kind is bool:
            yield f"{prefix}no-{name}"


def _bash(words: Mapping[str, tuple[str, ...]], *, zsh: bool) -> str:
    cases = "\n".join(f'    "{name}") options="{" ".join(options)}" ;;' for name, options in words.items())
    first = " ".join(dict.fromkeys(name.split()[0] for name in words))
    second = _second_words(words)
    groups = "\n".join(f'    {name}) [ "$COMP_CWORD" -eq 2 ] && options="{" ".join(more)}" ;;' for name, more in second)
    head = "autoload -U +X bashcompinit && bashcompinit\n" if zsh else ""
    return f"""{head}_mae() {{
  local options="" word="${{COMP_WORDS[COMP_CWORD]}}"
  if [ "$COMP_CWORD" -eq 1 ]; then options="{first} --help --version"; fi
  case "${{COMP_WORDS[1]}} ${{COMP_WORDS[2]}}" in
{cases}
  esac
  [ -n "$options" ] || case "${{COMP_WORDS[1]}}" in
{cases}
{groups}
  esac
  COMPREPLY=($(compgen -W "$options" -- "$word"))
}}
complete -o default -F _mae mae"""


def _fish(words: Mapping[str, tuple[str, ...]]) -> str:
    first = " ".join(dict.fromkeys(name.split()[0] for name in words))
    lines = [f'complete -c mae -n __fish_use_subcommand -f -a "{first}"']
    for name, more in _second_words(words):
        lines.append(f'complete -c mae -n "__fish_seen_subcommand_from {name}" -f -a "{" ".join(more)}"')
    for name, options in words.items():
        seen = " && ".join(f"__fish_seen_subcommand_from {word}" for word in name.split())
        lines += [f'complete -c mae -n "{seen}" -l {option.removeprefix("--")}' for option in options]
    return "\n".join(lines)


def _second_words(words: Mapping[str, tuple[str, ...]]) -> list[tuple[str, list[str]]]:
    """Pair the first word of commands of two words with their second words."""
    found: dict[str, list[str]] = {}
    for name in words:
        first, _, second = name.partition(" ")
        if second:
            found.setdefault(first, []).append(second)
    return list(found.items())
