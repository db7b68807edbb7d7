"""`diffrl submit`: a run as a job of a Ray cluster, by its head's HTTP address.

The job is `diffrl train CONFIG ... --resume auto` in a copy of the working directory, so that a job for a run that was begun
goes on with it. Its metadata say which run it is; of two live jobs with one run_dir the second is refused.
"""

import asyncio
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from diffrl.config_file import load_config
from diffrl.errors import ConfigError

EXCLUDES = ("runs/", ".venv-*/")  # beside what Ray leaves out and .gitignore and .rayignore name
POLL_S = 1.0
STOP_S = 60.0  # a job ends after it was told to
INTERRUPTED = 130  # exit status, as of a shell


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """Submission(config="configs/quickstart.yaml", overrides=("run_dir=/shared/runs/first",), address="http://head:8265")"""

    config: str
    overrides: Sequence[str]
    address: str
    working_dir: str = "."
    labels: Mapping[str, str] | None = None  # of the node that the driver runs on; None: the head
    name: str | None = None  # of the job; None: Ray's choice

    def entrypoint(self) -> str:
        config = os.path.relpath(self.config, self.working_dir)
        return shlex.join(["diffrl", "train", config, *self.overrides, "--resume", "auto"])


def submit(submission: Submission, *, wait: bool = True) -> int:
    """Start the job and, with `wait`, show its log until it ends; its exit status. Raises ConfigError."""
    run_dir = checked_run_dir(submission)
    with said_of(submission.address):
        client = open_client(submission.address)
        if job := live_job(client, run_dir):
            raise ConfigError(
                f"run_dir: {run_dir} is that of job {job.submission_id}, which is {job.status.value.lower()}; choose "
                f"another, or stop it: {stop_command(job.submission_id, submission.address)}"
            )
        job_id = start(client, submission, run_dir)
    print(f"job {job_id}: {submission.entrypoint()}", file=sys.stderr, flush=True)
    if not wait:
        print(job_id)
        return 0
    try:
        with said_of(submission.address):
            return follow(client, job_id)
    except KeyboardInterrupt:
        words = f"the job goes on; stop it: {stop_command(job_id, submission.address)}"
        print(f"\n{words}", file=sys.stderr)
        return INTERRUPTED


def live_job(client: JobSubmissionClient, run_dir: str) -> JobDetails | None:
    """The one that has not ended."""
    jobs = (job for job in client.list_jobs() if (job.metadata or {}).get("run_dir") == run_dir)
    return next((job for job in jobs if not job.status.is_terminal()), None)


def start(client: JobSubmissionClient, submission: Submission, run_dir: str) -> str:
    """The job's name."""
    return client.submit_job(
        entrypoint=submission.entrypoint(),
        submission_id=submission.name,
        runtime_env={"working_dir": submission.working_dir, "excludes": list(EXCLUDES)},
        metadata={"run_dir": run_dir, "config": submission.config, "version": version("diffrl")},
        entrypoint_label_selector=None if submission.labels is None else dict(submission.labels),
    )


def checked_run_dir(submission: Submission) -> str:
    """Of a config that the job can read."""
    folder, config = Path(submission.working_dir), Path(submission.config)
    if not folder.is_dir():
        raise ConfigError(f"--working-dir: {submission.working_dir} is not a folder; name the one that the job gets")
    run_dir = load_config(submission.config, submission.overrides).run_dir
    if not config.resolve().is_relative_to(folder.resolve()):
        raise ConfigError(
            f"config: {config} is not in {folder}, of which the job gets a copy; move it, or set --working-dir"
        )
    if not Path(run_dir).is_absolute():
        raise ConfigError(
            f"run_dir: {run_dir} would be in the job's copy of {folder}, which goes away with it; set an absolute path that all "
            "nodes see, such as run_dir=/shared/runs/first"
        )
    return run_dir


def follow(client: JobSubmissionClient, job_id: str) -> int:
    """Print what the job prints until it ends."""

    async def tail() -> None:
        async for text in client.tail_job_logs(job_id):
            print(text, end="", flush=True)

    asyncio.run(tail())
    job = ended(client, job_id)
    print(f"job {job_id}: {job.status.value.lower()}", file=sys.stderr)
    if job.status == JobStatus.SUCCEEDED:
        return 0
    if job.driver_exit_code is None:
        print(f"{job.message}", file=sys.stderr)  # it was stopped, or did not start
    return job.driver_exit_code or 1


def ended(client: JobSubmissionClient, job_id: str, timeout_s: float = float("inf")) -> JobDetails:
    """The job when it has, or after so long."""
    deadline = time.monotonic() + timeout_s
    while not (job := client.get_job_info(job_id)).status.is_terminal() and time.monotonic() < deadline:
        time.sleep(POLL_S)
    return job


def stop(job_id: str, address: str) -> None:
    """End a job. Raises ConfigError when there is none of that name."""
    with said_of(address):
        client = open_client(address)
        if all(job.submission_id != job_id for job in client.list_jobs()):
            raise ConfigError(f"--stop: {job_id} is no job of {address}; `ray job list --address {address}` names them")
        client.stop_job(job_id)
        print(f"job {job_id}: {ended(client, job_id, STOP_S).status.value.lower()}")


def stop_command(job_id: str | None, address: str) -> str:
    return f"diffrl submit --stop {job_id} --address {address}"


def open_client(address: str) -> JobSubmissionClient:
    if not address.startswith(("http://", "https://")):
        raise ConfigError(f"--address: {address!r} must be the head's, such as http://HEAD:8265")
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):  # Ray would take them before ours
        os.environ.pop(name, None)
    return JobSubmissionClient(address)


@contextmanager
def said_of(address: str) -> Iterator[None]:
    """What goes wrong between here and the head becomes a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except AuthenticationError as error:
        wrong = (
            "asks for a token"
            if "required" in str(error) or "RAY_AUTH_TOKEN" not in os.environ
            else "refuses the token"
        )
        raise ConfigError(
            f"--address: {address} {wrong}; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's"
        ) from error
    except ConnectionError as error:
        raise ConfigError(
            f"--address: nobody answers at {address}; name the head's dashboard, or forward its port: "
            "kubectl port-forward svc/HEAD 8265"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:  # what is there is no Ray head, or took offence
        raise ConfigError(f"--address: {address}: {' '.join(str(error).split())[:400]}") from error
