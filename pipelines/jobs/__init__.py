"""Jobs on a Ray cluster: submit a command, follow its log, list and stop jobs."""

from pipelines.jobs.server import JobRecord, JobServer, job_server_address, open_job_server

__all__ = ["JobRecord", "JobServer", "job_server_address", "open_job_server"]
