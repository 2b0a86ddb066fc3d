"""A real S3 server that a test can kill."""

import os
import subprocess
from pathlib import Path

from pipelines.bench.object_store import server_command
from pipelines.bench.ports import StorePorts
from tests.waiting import COMMAND_DEADLINE_S, KILLED_DEADLINE_S, wait_until

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testkey", "AWS_SECRET_ACCESS_KEY": "testsecretkey", "AWS_REGION": "us-east-1"}


class S3Server:
    """A SeaweedFS server of its own folder, which can be killed and started again."""

    def __init__(self, folder: Path, ports: StorePorts) -> None:
        self._folder, self._ports = folder, ports
        self._process: subprocess.Popen[bytes] | None = None
        self.endpoint = f"http://127.0.0.1:{ports['s3']}"
        self.uri = "s3://mae-test"

    def start(self) -> None:
        """Start the server and wait until it responds."""
        command = server_command(self._folder, "mae-test", self._ports)
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, env={**os.environ, **CREDENTIALS}, stdout=log, stderr=log)
        self._wait_for_bucket()

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(KILLED_DEADLINE_S)

    def stop(self) -> None:
        """Stop the server and wait until it has ended."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(KILLED_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self.kill()

    def _wait_for_bucket(self) -> None:
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError

        credentials = {
            "aws_access_key_id": CREDENTIALS["AWS_ACCESS_KEY_ID"],
            "aws_secret_access_key": CREDENTIALS["AWS_SECRET_ACCESS_KEY"],
        }
        client = boto3.client("s3", endpoint_url=self.endpoint, region_name="us-east-1", **credentials)
        process = self._process
        assert process is not None
        wait_until(
            lambda: client.head_bucket(Bucket="mae-test"),
            lambda: f"the bucket of the S3 server: {(self._folder / 'log').read_text()[-2000:]}",
            COMMAND_DEADLINE_S,
            alive=lambda: process.poll() is None,
            errors=(BotoCoreError, ClientError),
            poll_every_s=0.2,
        )
