"""Terminal output: results on stdout, everything else on stderr."""

import json
import logging
import sys
from typing import Any


def set_up_logging() -> None:
    """Log our own messages to stderr from level INFO on, and those of libraries from WARNING on."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    for name in ("pipelines", "tune", "mae_core"):
        logging.getLogger(name).setLevel(logging.INFO)


def log_to_driver() -> None:
    """Send our log messages to the driver's terminal; called in a Ray process, where other loggers show errors only."""
    ours = logging.getLogger("pipelines")
    ours.setLevel(logging.INFO)
    ours.propagate = False
    if not ours.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
        ours.addHandler(handler)


def print_result(command: str, result: dict[str, Any], *, as_json: bool) -> None:
    """Print the result to stdout: as one JSON object, or for people as `text`, or one line per field.

    With `as_json`, a result that is a list (`objects`) is printed as one JSON object per line.
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
