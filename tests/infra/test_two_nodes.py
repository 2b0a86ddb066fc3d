"""A real cluster of two nodes on this machine: jobs submitted to it, two DDP workers over gloo, and the hand-over."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from pipelines.runs.folder import RunFolder
from pipelines.runs.metrics import read_points
from tests.waiting import JOB_DEADLINE_S

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NANO = """--name two-nodes --epochs 1 --model.arch vit_pico_patch4 --model.image-px 16 16
    --model.decoder-depth 1 --model.decoder-width 32 --model.decoder-heads 2 --optim.warmup-epochs 0
    --data.batch 16 --data.micro-batch 4 --data.window 16
    --compute.num-workers 2 --compute.spread"""
LINES = "import time\nfor i in range(40):\n    print('line', i, flush=True); time.sleep(0.1)"


def as_user(local_cluster, script: str, *arguments: str) -> str:
    """Run a script with the environment of a user of the cluster, which Ray reads once a process; return its output."""
    outcome = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={**local_cluster.environment, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=JOB_DEADLINE_S,
    )
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


def noise(folder: Path) -> Path:
    """Write 40 images of two classes; return their folder."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 16, 16, 3), dtype=np.uint8)
    for i, image in enumerate(pixels):
        file = folder / "images" / "ab"[i % 2] / f"{i:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    return folder / "images"


ALONE = """
import ray
from pipelines.cluster import ray_session

with ray_session(None):
    print(len(ray.nodes()))
"""


def test_a_command_without_an_address_starts_its_own_ray_beside_the_cluster(local_cluster) -> None:
    assert "RAY_ADDRESS" not in local_cluster.environment
    assert as_user(local_cluster, ALONE).strip() == "1"


FOLLOWED = """
import json, sys
from pipelines.config import JobsConfig
from pipelines.jobs import open_job_server
from pipelines.jobs.submit import follow, jobs
from tests.infra.dropping_proxy import dropping_proxy

url, command = sys.argv[1:]
written = []
with dropping_proxy(int(url.rpartition(":")[2])) as proxy:
    server = open_job_server(proxy.url)
    assert server.submit(command, id="lines") == "lines"
    assert server.submit("true", id="lines") is None, "an id is taken once"
    assert server.find("another") is None

    def write(text):
        written.append(text)
        if any(f"line {i}\\n" in text for i in (5, 25)):
            proxy.drop()

    record = follow(server, "lines", write)
    assert proxy.num_dropped
for wrong in (lambda: jobs(JobsConfig(address=url, stop="none")), lambda: open_job_server("http://127.0.0.1:9")):
    try:
        wrong()
    except ValueError as error:
        written.append(f"refused: {error}\\n")
listed = jobs(JobsConfig(address=url))
result = {"log": "".join(written), "status": record.status, "exit": record.exit_status, "listed": listed["text"]}
print(json.dumps(result))
"""

SLOW_TO_END = """
import pathlib, signal, sys, time

def end(*_):
    time.sleep(5)
    pathlib.Path(sys.argv[1], "ended").touch()
    sys.exit()

signal.signal(signal.SIGTERM, end)
pathlib.Path(sys.argv[1], "begun").touch()
while True:
    time.sleep(0.1)
"""

STOPPED = """
import json, sys
from pathlib import Path
from pipelines.config import JobsConfig
from pipelines.jobs import open_job_server
from pipelines.jobs.submit import follow, jobs
from tests.waiting import RUN_DEADLINE_S, wait_until

url, command, folder, begun = sys.argv[1:]
server = open_job_server(url)
id = server.submit(command)

def runs():
    return not server.find(id).has_ended

wait_until(lambda: list(Path(folder).glob(begun)), begun, RUN_DEADLINE_S, alive=runs, poll_every_s=0.1)
said, log = jobs(JobsConfig(address=url, stop=id))["text"], []
print(json.dumps({"said": said, "status": follow(server, id, log.append).status, "log": "".join(log)}))
"""

HANDED_OVER = """
import json, sys
from concurrent.futures import ThreadPoolExecutor
from pipelines.config import HandoffConfig
from pipelines.handoff.handing_over import handoff
from pipelines.jobs import open_job_server
from pipelines.jobs.submit import follow

config = HandoffConfig(jobs=sys.argv[1], address=sys.argv[2])
with ThreadPoolExecutor(2) as pool:
    passes = list(pool.map(handoff, [config, config]))
server, log = open_job_server(config.address), []
(submitted,) = [record for record in server.jobs() if record.metadata.get("mae.attempt")]
record = follow(server, submitted.id, log.append)
last = handoff(config)
num_jobs = len([record for record in server.jobs() if record.metadata.get("mae.attempt")])
result = {"states": [found["jobs"][0]["state"] for found in passes], "status": record.status, "log": log}
print(json.dumps(result | {"last": last["jobs"][0], "num_jobs": num_jobs}))
"""


def test_a_submitted_command_runs_in_a_copy_of_the_folder_and_gives_its_exit_status(
    local_cluster, tmp_path: Path
) -> None:
    (tmp_path / "here.txt").write_text("seen from the copy")
    (tmp_path / "secret.txt").write_text("x")
    (tmp_path / ".gitignore").write_text("secret.txt\n")
    code = (
        "import os; print(open('here.txt').read(), os.path.exists('secret.txt'), os.environ['A']); raise SystemExit(3)"
    )
    words = [sys.executable, "-m", "pipelines", "submit", "--address", local_cluster.dashboard, "--env", "A=b c"]
    outcome = subprocess.run(
        [*words, "--id", "mine", "--", "python", "-c", code],
        env={"PYTHONPATH": str(Path(__file__).parents[2]), **local_cluster.environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=JOB_DEADLINE_S,
    )
    assert "seen from the copy False b c\n" in outcome.stderr
    assert outcome.returncode == 3, outcome.stderr
    assert outcome.stdout.startswith("mine FAILED: ")


def test_a_log_is_followed_over_dropped_connections_and_each_line_appears_once(local_cluster) -> None:
    found = json.loads(as_user(local_cluster, FOLLOWED, local_cluster.dashboard, shlex.join(["python", "-c", LINES])))
    lines = found["log"].splitlines()
    assert [line for line in lines if line.startswith("line")] == [f"line {i}" for i in range(40)]
    assert (found["status"], found["exit"]) == ("SUCCEEDED", 0)
    refused = [line for line in lines if line.startswith("refused")]
    assert "has no job 'none'; `mae jobs` lists them" in refused[0]
    assert "does not answer" in refused[1]
    assert ["lines", "SUCCEEDED"] in [line.split()[:2] for line in found["listed"].splitlines()]


def test_a_job_that_is_stopped_has_longer_than_rays_three_seconds_to_end(local_cluster, tmp_path: Path) -> None:
    command = shlex.join(["python", "-c", SLOW_TO_END, str(tmp_path)])
    found = json.loads(as_user(local_cluster, STOPPED, local_cluster.dashboard, command, str(tmp_path), "begun"))
    assert (found["said"], found["status"]) == ("stopping", "STOPPED")
    assert (tmp_path / "ended").exists()


@pytest.mark.long
def test_a_pretraining_that_is_stopped_as_a_job_saves_its_step_and_ends_like_one_that_was_not(
    local_cluster, tmp_path: Path
) -> None:
    prepared = tmp_path / "prepared"
    assert local_cluster.submit("mae", "prepare", str(noise(tmp_path)), str(prepared)).returncode == 0

    def run_of(output: str) -> tuple[str, RunFolder]:
        words = f"mae pretrain --data.uri {prepared} --output {tmp_path / output} {NANO} --epochs 100"
        words += " --checkpoint.every-epochs 1000 --tracking.log-every-steps 1"
        return shlex.join(shlex.split(words)), RunFolder(str(tmp_path / output / "two-nodes"))

    command, run = run_of("stopped")
    begun = "stopped/two-nodes/metrics/*"
    found = json.loads(as_user(local_cluster, STOPPED, local_cluster.dashboard, command, str(tmp_path), begun))
    step = run.checkpoints.latest_step()
    assert 0 < step < 300, found["log"]
    assert (found["said"], found["status"]) == ("stopping", "STOPPED")
    assert [line for line in found["log"].splitlines() if line.startswith("mae:")] == [
        "mae: SIGTERM: stopping in order; a second one ends at once",
        f"mae: two-nodes stopped at step {step} of 300; to resume: {command}",
    ]
    assert "Traceback" not in found["log"].partition("mae: SIGTERM")[2], found["log"]
    last = max(
        point.step for path, _ in run.storage.list("metrics") for point in read_points(run.storage.read(path), path)
    )
    assert last == step
    assert local_cluster.statuses()["two-nodes"] == "KILLED"

    resumed, undisturbed = local_cluster.submit(*shlex.split(command)), run_of("undisturbed")
    assert f"at step {step} with 2 workers" in resumed.stdout, resumed.stdout
    assert local_cluster.submit(*shlex.split(undisturbed[0])).returncode == 0
    assert run.storage.read("export/mae.safetensors") == undisturbed[1].storage.read("export/mae.safetensors")


@pytest.mark.long
def test_pretraining_spreads_over_two_nodes_and_its_version_becomes_a_classifier_once(
    local_cluster, tmp_path: Path
) -> None:
    images, prepared, runs = noise(tmp_path), tmp_path / "prepared", tmp_path / "runs"
    commands = [
        f"mae prepare {images} {prepared} --hold-out stratified",
        f"mae pretrain --data.uri {prepared} --output {runs} {NANO}",
    ]
    outcome = local_cluster.submit("sh", "-c", " && ".join(shlex.join(shlex.split(line)) for line in commands))
    assert outcome.returncode == 0, outcome.stdout
    assert sorted(local_cluster.workers().values()) == sorted(local_cluster.node_ids.values())
    (run,) = local_cluster.finished_runs()
    assert run["info"]["run_name"] == "two-nodes"

    options = {"data.uri": str(prepared), "epochs": 1, "data.batch": 18, "data.micro_batch": 18, "augment.crop": "none"}
    job = {"name": "ab", "model": "mae-vit_pico_patch4", "alias": "candidate"}
    job |= {"options": options | {"optim.warmup_epochs": 0.0, "classifier.train_blocks": 0}}
    (tmp_path / "handoff.yaml").write_text(yaml.safe_dump({"output": str(runs), "jobs": [job]}))
    found = json.loads(as_user(local_cluster, HANDED_OVER, str(tmp_path / "handoff.yaml"), local_cluster.dashboard))
    assert found["states"] == ["running"] * 2
    assert found["status"] == "SUCCEEDED", "".join(found["log"])
    assert found["last"]["state"] == "finished"
    assert found["last"]["said"] == "models:/mae-vit_pico_patch4-classifier/1"
    assert found["num_jobs"] == 1
