"""`mae submit` and `mae jobs`: run a command on a cluster from a copy of this folder, and see what became of it."""

import asyncio
import logging
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from mae_core.errors import UserError
from pipelines.config import JobsConfig, SubmitConfig
from pipelines.interrupts import Interrupted
from pipelines.jobs.server import JobRecord, JobServer, JobServerUnreachable, open_job_server

log = logging.getLogger(__name__)

_RECONNECT_S = 1.0
_MOST_SHOWN_CHARS = 80


def submit(words: Sequence[str], config: SubmitConfig) -> dict[str, Any]:
    """Submit the command, follow its log until it ends, and return its record with the command's exit status.

    Raises UserError if there is no cluster, or if the folder does not exist or is too large to be packed. Raises
    Interrupted after a signal: the job continues.
    """
    folder = Path(config.working_dir)
    if config.working_dir and not folder.is_dir():
        raise UserError(f"working_dir {config.working_dir} is no folder; give one, or --working-dir '' for none")
    pairs = [pair.partition("=") for pair in config.env]
    runtime_env: dict[str, Any] = {"env_vars": {name: value for name, _, value in pairs}}
    if config.working_dir:
        runtime_env |= {"working_dir": str(folder.absolute()), "excludes": list(config.exclude)}
    server = open_job_server(config.address)
    id = server.submit(shlex.join(words), id=config.id or None, runtime_env=runtime_env)
    if id is None:
        raise UserError(
            f"the cluster has had a job {config.id!r}; leave --id out, or follow it: mae jobs --follow {config.id}"
        )
    log.info("submitted as %s", id)
    if config.detach:
        return {"id": id, "text": id}
    return _result(follow(server, id))


def jobs(config: JobsConfig) -> dict[str, Any]:
    """List the jobs of a cluster, or follow or stop one. Raises UserError if there is none with that id."""
    server = open_job_server(config.address)
    if config.follow:
        if server.find(config.follow) is None:
            raise UserError(f"the cluster at {server.address} has no job {config.follow!r}; `mae jobs` lists them")
        return _result(follow(server, config.follow))
    if config.stop:
        stopped = server.stop(config.stop)
        return {"id": config.stop, "stopped": stopped, "text": "stopping" if stopped else "it had ended before"}
    found = server.jobs()
    return {"jobs": [asdict(record) for record in found], "text": _table(found)}


def follow(server: JobServer, id: str, write: Callable[[str], object] | None = None) -> JobRecord:
    """Copy the job's log to stderr, or to `write`, until it ends; return its record.

    The server sends the log from its beginning. After a dropped connection the characters that were written are
    skipped, so that each is written once. Raises JobServerUnreachable if the server is gone for two minutes.
    """
    num_written, to = 0, write or sys.stderr.write
    try:
        while True:
            num_written, is_whole = asyncio.run(_copy(server, id, num_written, to))
            record = server.find_through_outage(id)
            if record is None:
                raise UserError(f"job {id} is gone from {server.address}: the cluster was restarted; submit it again")
            if record.has_ended and is_whole:
                return record
            if record.has_ended:
                # What was logged between the drop of the connection and the end.
                asyncio.run(_copy(server, id, num_written, to))
                return record
            log.warning("the connection to %s dropped; reconnecting", server.address)
            time.sleep(_RECONNECT_S)
    except KeyboardInterrupt:
        raise Interrupted(
            f"job {id} continues; follow it: mae jobs --follow {id}; stop it: mae jobs --stop {id}"
        ) from None


async def _copy(server: JobServer, id: str, num_written: int, write: Callable[[str], object]) -> tuple[int, bool]:
    """Write the log beyond `num_written` characters until the connection ends.

    Returns how many characters are written by then, and whether the server closed the connection in order.
    """
    import aiohttp

    at, is_whole = 0, True
    try:
        async for text in server.tail(id):
            fresh = text[max(0, num_written - at) :]
            at += len(text)
            if fresh:
                write(fresh)
            num_written = max(num_written, at)
    except (RuntimeError, OSError, aiohttp.ClientError, JobServerUnreachable) as error:
        log.debug("log of %s: %s", id, error)
        is_whole = False
    return num_written, is_whole


def _result(record: JobRecord) -> dict[str, Any]:
    """Return the record; its `exit_status`, that of the command, becomes ours."""
    status = record.exit_status
    if status is None or (status == 0 and record.status != "SUCCEEDED"):
        status = 0 if record.status == "SUCCEEDED" else 1
    # A command that a signal ended has minus its number.
    status = 128 - status if status < 0 else status
    said = "" if record.status == "SUCCEEDED" else f": {record.message}"
    return {**asdict(record), "exit_status": status, "text": f"{record.id} {record.status}{said}"}


def _table(found: Sequence[JobRecord]) -> str:
    if not found:
        return "no jobs"
    width = max(len(record.id) for record in found)
    lines = []
    for record in found:
        started = datetime.fromtimestamp(record.start_s).strftime("%Y-%m-%d %H:%M:%S") if record.start_s else "-"
        command = (
            record.command if len(record.command) <= _MOST_SHOWN_CHARS else f"{record.command[:_MOST_SHOWN_CHARS]}..."
        )
        lines.append(f"{record.id:<{width}}  {record.status:<9}  {started}  {command}")
    return "\n".join(lines)
