"""Start a cluster on loopback, walk from a bucket of images to a champion with classifiers, kill servers meanwhile.

    python infra/cluster_demo [--undisturbed] [--keep]

1. Postgres, an S3 store, MLflow, a Ray head and a worker node start in a temporary folder, with secrets made for them.
2. Bucket, prepare, pretrain, gate, promotion, hand-over to two classifiers; a second pretraining that fails the gate; a
   third that passes and replaces the first; its classifiers; rollback.
3. Meanwhile Postgres, the worker node, the reconciler, MLflow and the store are killed, each once, and started again.
4. The same walk without faults on a second cluster; the two registries must be equal: names, aliases, histories,
   lineage, metrics, and the sha256 of every file.

Exit status 0 if they are. Every process that was started has ended by then, also after a failure and Ctrl-C.
"""

import argparse
import json
import os
import secrets
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

from cluster import Cluster
from processes import end_all
from registry_state import differences
from services import postgres_program
from walk import Walk

_MARK = "MAE_CLUSTER_DEMO"
_begin_s = time.monotonic()


def say(line: str) -> None:
    """Print a line with the seconds since the start."""
    print(f"{time.monotonic() - _begin_s:5.0f} s  {line}", flush=True)


def walk(folder: Path, *, disturbed: bool) -> tuple[Walk, dict[str, Any]]:
    """Walk on a cluster of its own; return the walk and what its registry holds."""
    say(f"the walk {'with' if disturbed else 'without'} faults, in {folder}")
    folder.mkdir()
    folder.chmod(0o711)  # Postgres has a user of its own if we are root.
    cluster = Cluster(folder)
    try:
        begin_s = time.monotonic()
        cluster.start()
        say(f"   Postgres, S3 store, MLflow and two Ray nodes respond after {time.monotonic() - begin_s:.0f} s")
        taken = Walk(cluster, say, disturbed=disturbed)
        found = taken.walk()
        (folder / "registry.json").write_text(json.dumps(found, indent=1))
        return taken, found
    finally:
        cluster.stop()


def demo(folder: Path, *, only_undisturbed: bool) -> int:
    """Take both walks and compare them; return the exit status."""
    if only_undisturbed:
        walk(folder / "calm", disturbed=False)
        return 0
    disturbed, found = walk(folder / "faults", disturbed=True)
    undisturbed, wanted = walk(folder / "calm", disturbed=False)
    say("seconds by step, with and without faults")
    for name, calm_s in undisturbed.timings_s.items():
        say(f"   {name:28}{disturbed.timings_s[name]:6.0f}{calm_s:6.0f}")
    say(f"killed with SIGKILL and started again: {', '.join(disturbed.faults)}")
    if unequal := differences(found, wanted):
        say("the registries differ (with faults, without):")
        for line in unequal:
            say(f"   {line}")
        return 1
    num_versions = sum(len(model["versions"]) for model in found.values())
    num_files = sum(len(version["files"]) for model in found.values() for version in model["versions"].values())
    say(
        f"both registries are equal: {num_versions} versions and {num_files} files, "
        "aliases and their histories, lineage and metrics"
    )
    return 0


def main() -> int:
    """Run the demo; end what it started, whatever happens."""
    parser = argparse.ArgumentParser(prog="cluster_demo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--undisturbed", action="store_true", help="walk once, without faults")
    parser.add_argument("--keep", action="store_true", help="keep the temporary folder with logs and data")
    options = parser.parse_args()
    try:
        postgres_program("initdb")
    except FileNotFoundError as absent:
        print(f"{absent} (infra/system_packages.sh)", file=sys.stderr)
        return 2
    mark = os.environ[_MARK] = secrets.token_hex(8)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    # Short, since the path of a socket may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="mae-cd-", dir="/tmp"))
    folder.chmod(0o711)
    status = 1
    try:
        status = demo(folder, only_undisturbed=options.undisturbed)
    except KeyboardInterrupt:
        say("interrupted")
        status = 130
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        say(f"failed: {error}")
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        end_all(f"{_MARK}={mark}")
        if status and not options.keep:
            say(f"logs and data are kept in {folder}")
        elif not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
        say("every process that was started has ended")
    return status


if __name__ == "__main__":
    sys.exit(main())
