"""`diffrl submit`: jobs that are followed, left alone, stopped and refused; what is said of heads that are none."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobSubmissionClient

from actors import submit as jobs
from actors.submit import Submission
from tests.actors.conftest import Called, one_line
from tests.conftest import RayCluster

CONFIG = "stage: rl\nrun_dir: {run_dir}\ndata: {{source: microcode}}\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a config."""
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "rl.yaml").write_text(CONFIG.format(run_dir=tmp_path / "run"))
    monkeypatch.chdir(folder)
    return folder


def runs(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """What the jobs of a test run instead."""
    monkeypatch.setattr(Submission, "entrypoint", lambda submission: command)


def test_the_job_is_the_run_and_goes_on_with_it(tmp_path: Path):
    submission = Submission(
        config=str(tmp_path / "configs/rl.yaml"),
        overrides=("run_dir=/shared/a b",),
        address="http://head:8265",
        working_dir=str(tmp_path),
    )
    assert submission.entrypoint() == "diffrl train configs/rl.yaml 'run_dir=/shared/a b' --resume auto"


@pytest.mark.filterwarnings("ignore:ssl=None is deprecated")  # what Ray gives aiohttp
def test_a_job_is_followed_to_its_exit_status(
    ray_cluster: RayCluster, project: Path, tmp_path: Path, called: Called, monkeypatch: pytest.MonkeyPatch
):
    """With its metadata, and without what lies in runs/."""
    (project / "runs").mkdir()
    (project / "runs/big").write_text("x")
    runs(monkeypatch, "ls; test ! -e runs || exit 4; echo to stderr >&2; exit 3")
    status, stdout, stderr = called("submit", "rl.yaml", "--address", ray_cluster.dashboard)
    assert status == 3, (stdout, stderr)
    assert "rl.yaml" in stdout.splitlines() and "to stderr" in stdout
    job_id = stderr.split()[1].rstrip(":")
    assert f"job {job_id}: failed" in stderr
    job = JobSubmissionClient(ray_cluster.dashboard).get_job_info(job_id)
    assert job.metadata is not None and set(job.metadata) == {"run_dir", "config", "version"}
    assert (job.metadata["run_dir"], job.metadata["config"]) == (f"{tmp_path}/run", "rl.yaml")


def test_one_live_job_a_run(
    ray_cluster: RayCluster, project: Path, tmp_path: Path, called: Called, monkeypatch: pytest.MonkeyPatch
):
    """A second one is refused until the first is stopped; Ctrl-C while its log is shown does not stop it."""
    address = ("--address", ray_cluster.dashboard)
    runs(monkeypatch, "sleep 600")
    job_id = tmp_path.name  # of no other test
    assert called("submit", "rl.yaml", "--no-wait", "--submission-id", job_id, *address)[:2] == (0, f"{job_id}\n")
    client = JobSubmissionClient(ray_cluster.dashboard)

    one_line(
        called("submit", "rl.yaml", *address), [f"run_dir: {tmp_path}/run is that of job {job_id}", f"--stop {job_id}"]
    )

    def interrupted(*args: Any) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "follow", interrupted)
        status, _, told = called("submit", "rl.yaml", f"run_dir={tmp_path}/other", *address)
    other = told.split()[1].rstrip(":")
    assert status == 130 and f"the job goes on; stop it: diffrl submit --stop {other} --address" in told
    for name in (job_id, other):
        assert not client.get_job_info(name).status.is_terminal()
        assert called("submit", "--stop", name, *address) == (0, f"job {name}: stopped\n", "")
    assert called("submit", "--stop", other, *address) == (0, f"job {other}: stopped\n", "")
    one_line(called("submit", "--stop", "nothing", *address), ["--stop: nothing is no job of", "ray job list"])


BAD = {
    "neither": ([], ["give a config, or --stop"]),
    "both": (["rl.yaml", "--stop", "x"], ["give a config, or --stop"]),
    "an unknown key": (["rl.yaml", "zzz=1"], ["zzz: unknown key"]),
    "a folder that goes away": (["rl.yaml", "run_dir=runs/a"], ["run_dir: runs/a", "run_dir=/shared/runs/first"]),
    "no folder": (["rl.yaml", "--working-dir", "nowhere"], ["--working-dir: nowhere"]),
    "a config from elsewhere": (["rl.yaml", "--working-dir", "/usr/bin"], ["config: rl.yaml is not in /usr/bin"]),
    "no label": (["rl.yaml", "--entrypoint-label", "head"], ["--entrypoint-label: 'head' must be KEY=VALUE"]),
    "no URL": (["rl.yaml", "--address", "head:8265"], ["--address: 'head:8265'", "http://HEAD:8265"]),
    "nobody there": (["rl.yaml"], ["--address: nobody answers at http://127.0.0.1:1", "port-forward"]),
    "nobody there to stop": (["--stop", "x"], ["--address: nobody answers at http://127.0.0.1:1"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, project: Path, called: Called):
    arguments, expected = BAD[name]
    one_line(called("submit", "--address", "http://127.0.0.1:1", *arguments), expected)


@contextmanager
def answering(status: int, text: str = "") -> Iterator[str]:
    """Address of a server that answers everything so."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("status", "text", "said"),
    [
        (401, "no token", "asks for a token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"),
        (403, "wrong token", "refuses the token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"),
        (404, "", "Version check returned 404"),
        (200, "<html>", "Expecting value"),
        (500, "", "500 Server Error"),
    ],
)
def test_a_head_that_will_not(
    project: Path, called: Called, monkeypatch: pytest.MonkeyPatch, status: int, text: str, said: str
):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # of runs here, not of jobs there
    with answering(status, text) as address:
        one_line(called("submit", "rl.yaml", "--address", address), [f"--address: {address}", said])
