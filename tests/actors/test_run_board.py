"""The board that a run serves of itself: a process beside it, which ends with the run and changes nothing."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actors.driver import Run, train
from actors.run_board import RunBoard, check_board
from actors.telemetry import Telemetry
from diffrl.config import TelemetryConfig
from diffrl.errors import ConfigError
from tests.actors.conftest import Called, one_line, rl_config
from tests.diffrl.board_run import Shape, make_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", Shape(steps=2))


def until(found: Callable[[], Any], seconds: float = 300) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answer(url: str, path: str = "", **headers: str) -> bytes | None:
    """None where nobody answers."""
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}{path}", headers=headers), timeout=30) as page:
            return page.read()
    except urllib.error.HTTPError:
        raise
    except OSError:
        return None


def is_there(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_telemetry_serves_its_run_until_it_ends(folder: Path, capsys: pytest.CaptureFixture[str]):
    said = ""

    def address() -> str | None:
        nonlocal said
        said += capsys.readouterr().err
        return next((line.split()[1] for line in said.splitlines() if line.startswith("board: http")), None)

    with pytest.raises(KeyboardInterrupt), Telemetry(folder, 2, config=TelemetryConfig(sinks=[], board_port=0)) as told:
        url = until(address)
        assert url.startswith("http://127.0.0.1:")
        page, state = answer(url), json.loads(until(lambda: answer(url, "api/state")) or "")
        assert page is not None and b"<html" in page and state["runs"][0]["name"] == str(folder)
        assert told.board is not None and told.board.process is not None
        pid = told.board.process.pid
        assert os.getsid(pid) == pid and os.getpriority(os.PRIO_PROCESS, pid) >= 10
        raise KeyboardInterrupt
    assert not is_there(pid) and answer(url) is None
    assert "not served" not in said + capsys.readouterr().err


def test_its_token_is_that_of_the_environment(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DIFFRL_BOARD_TOKEN", "a token of sixteen")
    said: list[str] = []
    board = RunBoard(folder, 0, said.append)
    try:
        until(lambda: said)
        url = said[0].split()[1]
        assert "DIFFRL_BOARD_TOKEN" in said[0] and "sixteen" not in said[0]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            answer(url)
        assert answer(url, Authorization="Bearer a token of sixteen")
    finally:
        board.close()


def test_a_board_that_cannot_be_served_stops_nothing(tmp_path: Path):
    said: list[str] = []
    board = RunBoard(tmp_path, 0, said.append)  # no folder of a run
    until(lambda: said)
    board.close()
    assert len(said) == 1 and said[0].startswith("board: not served any more (RUN: ") and "the run goes on" in said[0]


def test_it_ends_with_a_run_that_is_killed(folder: Path):
    code = (
        "import sys, time; from pathlib import Path; from actors.run_board import RunBoard\n"
        "board = RunBoard(Path(sys.argv[1]), 0, lambda line: print(board.process.pid, line, flush=True)); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pid, _, url = parent.stdout.readline().split()[:3]
        assert answer(url) is not None
        parent.send_signal(signal.SIGKILL)
    until(lambda: not is_there(int(pid)))
    assert answer(url) is None


def test_a_port_that_is_taken_is_refused_before_anything_starts(tmp_path: Path, called: Called):
    """In RL and in a supervised stage."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        overrides = (f"run_dir={tmp_path}/run", f"telemetry.board_port={port}")
        told = [f"telemetry.board_port: {port} cannot be listened on", "0 for a free one"]
        for config in ("configs/quickstart.yaml", "configs/quickstart_pretrain.yaml"):
            one_line(called("train", config, *overrides), told)
        with pytest.raises(ConfigError, match=r"^telemetry\.board_port: "):
            check_board(TelemetryConfig(board_port=port))
    assert not (tmp_path / "run").exists()
    check_board(TelemetryConfig(board_port=port))
    check_board(TelemetryConfig(board_port=0))
    one_line(called("config", "configs/quickstart.yaml", "telemetry.board_port=70000"), ["board_port", "65535"])


def test_a_run_shows_itself_while_it_goes_on(ray_cluster, tuned_model: Path, problems_file: Path, tmp_path: Path):
    port = free_port()
    url = f"http://127.0.0.1:{port}/"
    seen: list[int] = []

    class Watched(Run):
        def step(self, step: int) -> None:
            super().step(step)

            def shown() -> bool:
                found = answer(url, "api/state")
                return found is not None and json.loads(found)["runs"][0]["steps"] == step + 1

            until(shown)
            seen.append(step)

    config = rl_config(
        *(tuned_model, problems_file, tmp_path / "run"),
        train={"steps": 2},
        telemetry={"board_port": port, "sinks": []},
    )
    train(config, run_class=Watched)
    assert seen == [0, 1] and answer(url) is None
