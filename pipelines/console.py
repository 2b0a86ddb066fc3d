"""What a person sees: results on stdout, all else on stderr."""

import json
import logging
import sys
from typing import Any


def set_up_logging() -> None:
    """Our own messages go to stderr; libraries speak up from warnings on."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in ("pipelines", "tune", "mae_core"):
        logging.getLogger(name).setLevel(logging.INFO)


def speak_up() -> None:
    """In a process of Ray's, our messages reach the driver's terminal, while Ray's own processes say errors only."""
    ours = logging.getLogger("pipelines")
    ours.setLevel(logging.INFO)
    ours.propagate = False
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        ours.addHandler(handler)


def print_result(command: str, result: dict[str, Any], *, as_json: bool) -> None:
    """The result stands on stdout: one JSON object, or what a person reads (`text`, or a line a field).

    A result of several equals (`objects`) is one JSON object a line.
    """
    if as_json and "objects" in result:
        for found in result["objects"]:
            print(json.dumps(found))
    elif as_json:
        print(json.dumps({key: value for key, value in result.items() if key != "text"}))
    elif "text" in result:
        print(result["text"])
    elif command == "config":
        import yaml

        print(yaml.safe_dump(result, sort_keys=False), end="")
    else:
        for key, value in result.items():
            if value not in ("", None, [], {}):
                print(f"{key}: {value}")
