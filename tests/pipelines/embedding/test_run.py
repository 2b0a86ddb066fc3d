"""On Ray, the number of actors and a kill change no byte."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pipelines.config import EmbedConfig
from pipelines.embedding.embed import embed
from tests.pipelines.prepare.test_prepare import files_of

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.usefixtures("ray4"),
    # Ray Data 2.60 sets deprecated fields of its own context.
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),
]

KILLED = """
import os, signal, sys, threading, time, logging
import ray
from pipelines.config import EmbedConfig
from pipelines.embedding.embed import embed
from pipelines.storage import open_storage
source, model, out, scratch = sys.argv[1:]
ray.init("local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, _temp_dir=scratch)
def die():
    while len(open_storage(out).list("parts")) < 2:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)
threading.Thread(target=die, daemon=True).start()
embed(source, out, EmbedConfig(model=model, batch=8, rows_per_part=16, actors=1))
time.sleep(600)
"""


def test_three_actors_and_a_kill_change_no_byte(
    few: Path, backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    source = str(few / "test")
    config = EmbedConfig(model=str(backbone), batch=8, rows_per_part=16, actors=3)
    request.getfixturevalue("in_process")
    result = embed(source, str(tmp_path / "undisturbed"), config)
    monkeypatch.undo()
    assert (result["num_found"], result["num_rows"]) == (60, 60)
    # Outside tmp_path, since a socket's path may be 107 bytes long; a killed Ray may still write into it.
    scratch = tempfile.TemporaryDirectory(prefix="mae-kill-", dir="/tmp", ignore_cleanup_errors=True)
    with scratch as ray_folder, (tmp_path / "log").open("wb") as log:
        words = [sys.executable, "-c", KILLED, source, str(backbone), str(tmp_path / "killed"), ray_folder]
        process = subprocess.Popen(words, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert process.wait(240) == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not (tmp_path / "killed/embeddings.json").exists()
    assert embed(source, str(tmp_path / "killed"), config) == result | {"uri": str(tmp_path / "killed")}
    assert files_of(tmp_path / "undisturbed") == files_of(tmp_path / "killed")
    assert not list((tmp_path / "killed").rglob(".*"))
