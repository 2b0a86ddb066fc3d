"""Refuse tracked pickles and large binary files.

    python infra/check_files.py [REPOSITORY]

Checks every file that git tracks, or would add: pickles are always refused, binary files over 1 MB unless ALLOWED
names them. Imports the standard library only.
"""

import subprocess
import sys
from pathlib import Path

LIMIT_BYTES = 1_000_000
PICKLE_SUFFIXES = (".pkl", ".pickle")
ALLOWED = frozenset({"pipelines/sample/fashion-mnist-sample.zip"})
"""Binary files over the limit that belong in the repository."""
_SNIFFED_BYTES = 8192


def listed_files(repository: Path) -> list[str]:
    """List tracked files and untracked ones that git does not ignore, as paths relative to the repository."""
    command = ["git", "-C", str(repository), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    output = subprocess.run(command, check=True, capture_output=True).stdout
    return sorted({name.decode("utf-8", "surrogateescape") for name in output.split(b"\0") if name})


def refusal(repository: Path, name: str, allowed: frozenset[str] = ALLOWED) -> str | None:
    """Explain why a file may not be committed; None if it may.

    A file is binary if its first 8 KiB contain a zero byte, as git decides it.
    """
    if name.lower().endswith(PICKLE_SUFFIXES):
        return f"{name}: pickles are not allowed; store the data in another format, or remove the file"
    path = repository / name
    if path.is_symlink() or not path.is_file() or name in allowed:
        return None
    num_bytes = path.stat().st_size
    if num_bytes <= LIMIT_BYTES:
        return None
    with path.open("rb") as file:
        is_binary = b"\0" in file.read(_SNIFFED_BYTES)
    if not is_binary:
        return None
    return (
        f"{name}: binary file of {num_bytes:,} bytes exceeds the limit of {LIMIT_BYTES:,}; "
        "remove it, or add it to ALLOWED in infra/check_files.py"
    )


def main(arguments: list[str]) -> int:
    """Print one line per refused file; return 1 if there is any, else 0."""
    repository = Path(arguments[0]) if arguments else Path(__file__).resolve().parents[1]
    refused = [reason for name in listed_files(repository) if (reason := refusal(repository, name))]
    for reason in refused:
        print(reason, file=sys.stderr)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
