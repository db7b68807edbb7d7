"""What the doctor finds under conditions that are really there: ports taken here, files, limits, configs with mistakes."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from ray._common.utils import get_system_memory
from ray._private.utils import get_shared_memory_bytes, resolve_object_store_memory

from actors.cli import main
from actors.doctor import (
    DISK_FLOOR,
    check_data,
    check_disk,
    check_sandbox,
    checkpoint_bytes,
    data_paths,
    examine,
    find_disk,
    saved_bytes,
)
from actors.machine import (
    Finding,
    attempted,
    check_open_files,
    check_packages,
    check_ports,
    check_python,
    check_ray,
    check_ray_auth,
    check_shared_memory,
    check_torch,
    find_torch,
    free_bytes,
    memory_bytes,
    object_store_bytes,
    our_requirements,
)
from diffrl.config import SftConfig
from diffrl.config_file import dump_config, load_config
from diffrl.models.folders import load_state_dict
from diffrl.models.sizes import sizes_of
from sandbox.backends import BackendOptions
from sandbox.image.fingerprint import judge_fingerprint
from tests.actors.conftest import rl_config
from tests.sandbox.fake_pods import FakePod

ROOT = Path(__file__).parents[2]
GB = 10**9


@pytest.fixture
def listening() -> Iterator[int]:
    """A port of this machine on which somebody listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# The machine


def test_an_old_python_is_bad():
    assert check_python(sys.version_info[:3]).verdict == "ok"
    found = check_python((3, 10, 14))
    assert found.verdict == "bad" and "3.10.14" in found.found and "3.11" in found.way_out


def test_installed_packages_fit_our_metadata():
    found = check_packages(our_requirements(), metadata.version)
    assert found.verdict == "ok" and not found.way_out
    told = dict(package.split() for package in found.found.split(", "))
    assert told["torch"] == torch.__version__ and told["ray"] == metadata.version("ray")
    assert not {"vllm", "pytest", "docker"} & told.keys()  # of extras


def test_packages_out_of_range_or_missing_are_named_with_what_to_install():
    requirements = ["torch>=2", "ray[data]<2,>=1.5", "no-such-package-of-ours>=1", 'vllm==0.0.1; extra == "vllm"']
    found = check_packages(requirements, metadata.version)
    assert found.verdict == "bad"
    assert found.found == f"ray {metadata.version('ray')} is not <2,>=1.5; no-such-package-of-ours is missing"
    assert found.way_out.endswith("pip install 'ray[data]<2,>=1.5' 'no-such-package-of-ours>=1'")
    assert check_packages(None, metadata.version).verdict == "bad"


def test_torch_of_this_machine():
    found = find_torch()
    assert f"torch {torch.__version__}" in found.found and f"{torch.get_num_threads()} CPU threads" in found.found
    assert f"{torch.cuda.device_count()} CUDA devices" in found.found
    assert (found.verdict == "ok") == (not found.way_out)


@pytest.mark.parametrize(
    ("built_for", "devices", "nvidia", "verdict", "way_out"),
    [
        (None, [], [], "ok", ""),
        ("12.8", ["NVIDIA H100", "NVIDIA H100"], ["/dev/nvidia0", "/dev/nvidia1"], "ok", ""),
        ("12.8", [], ["/dev/nvidia0"], "warn", "CUDA_VISIBLE_DEVICES"),
        ("12.8", [], [], "warn", "TORCH_INDEX"),
        (None, [], ["/dev/nvidia0"], "warn", "CUDA builds"),
    ],
)
def test_torch_and_devices_that_do_not_go_together(built_for, devices, nvidia, verdict, way_out):
    found = check_torch("2.13.0", built_for=built_for, devices=devices, threads=2, nvidia=nvidia)
    assert found.verdict == verdict and way_out in found.way_out and bool(found.way_out) == (verdict != "ok")
    assert f"built for {'CPU' if built_for is None else 'CUDA 12.8'}; {len(devices)} CUDA devices" in found.found


def test_a_package_that_cannot_be_imported_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken_for_the_doctor.py").write_text("raise ImportError('libcudart.so.12:\\n no such file')\n")
    monkeypatch.syspath_prepend(tmp_path)

    def look() -> Finding:
        __import__("broken_for_the_doctor")
        return Finding(check="torch", verdict="ok", found="")

    found = attempted("torch", look)
    assert found.verdict == "bad" and "libcudart.so.12: no such file" in found.found and "make venv" in found.way_out


def test_an_address_that_answers(listening: int):
    for address in (f"127.0.0.1:{listening}", f"ray://127.0.0.1:{listening}", f"http://localhost:{listening}/"):
        found = check_ray(address, timeout=2)
        assert found.verdict == "ok" and address in found.found
    assert check_ray(None, timeout=2).verdict == check_ray("local", timeout=2).verdict == "ok"


def test_an_address_where_nobody_answers():
    port = free_port()
    found = check_ray(f"127.0.0.1:{port}", timeout=2)
    assert found.verdict == "bad" and f"127.0.0.1:{port}" in found.found and f"--port={port}" in found.way_out
    for address in ("127.0.0.1", "head:port", "127.0.0.1:99999", ":6379"):
        found = check_ray(address, timeout=2)
        assert found.verdict == "bad" and address in found.found and found.way_out, address


def test_taken_ports_are_named_by_their_options(listening: int):
    other = free_port()
    found = check_ports({other: "--port", listening: "--dashboard-port"})
    assert found.verdict == "warn" and found.found == f"taken: {listening}"
    assert "--dashboard-port=PORT" in found.way_out and "--port=PORT" not in found.way_out.replace("dashboard-port", "")
    assert check_ports({other: "--port"}).verdict == "ok"


TOKEN = {"RAY_AUTH_MODE": "token"}
AUTH = [  # environment, a token in the file, joins a cluster: verdict, words
    ({}, False, False, "ok", "none yet; a run's own cluster uses it and writes"),
    ({}, True, False, "ok", "auth_token; a run's own cluster uses it"),
    ({}, False, True, "ok", "without authentication"),
    ({}, True, True, "warn", "who joins by an address does not"),
    ({"RAY_AUTH_MODE": "disabled"}, True, False, "warn", "whoever reaches"),
    (TOKEN, True, True, "ok", "auth_token"),
    (TOKEN, False, False, "warn", "no token yet"),
    (TOKEN, False, True, "bad", "no token in"),
    (TOKEN | {"RAY_AUTH_TOKEN": "secret"}, False, True, "ok", "RAY_AUTH_TOKEN"),
    (TOKEN | {"RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, True, False, "bad", "/nowhere/token"),
]


@pytest.mark.parametrize(("environment", "with_token", "joins", "verdict", "words"), AUTH)
def test_authentication(tmp_path: Path, environment, with_token, joins, verdict, words):
    if with_token:
        (tmp_path / "auth_token").write_text("0123")
    found = check_ray_auth(environment, tmp_path / "auth_token", joins=joins)
    assert found.verdict == verdict and words in found.found and bool(found.way_out) == (verdict != "ok")
    assert "secret" not in str(found)


def test_the_token_file_is_where_ray_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """Ray's own command makes it; the doctor finds it there."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    auth = [f for f in examine(None, []) if f.check == "ray auth"]
    assert [f.found.count("none yet") for f in auth] == [1]
    ray = Path(sys.executable).parent / "ray"
    token = subprocess.run([ray, "get-auth-token", "--generate"], capture_output=True, text=True, check=True).stdout
    (found,) = [f for f in examine(None, []) if f.check == "ray auth"]
    assert f"token: {tmp_path}/.ray/auth_token;" in found.found and token and token not in str(found)


def test_the_object_store_is_as_large_as_ray_makes_it():
    """Ray's own arithmetic, with the /dev/shm of this machine."""
    assert memory_bytes() == get_system_memory()
    free = free_bytes("/dev/shm")
    assert free == pytest.approx(get_shared_memory_bytes(), abs=1 << 30)
    for memory in (2 * GB, 30 * GB, 40 * GB, 100 * GB, 2000 * GB):
        ours = object_store_bytes(get_shared_memory_bytes(), memory)
        assert ours == pytest.approx(resolve_object_store_memory(memory), rel=1e-3), memory


def test_small_shared_memory():
    found = check_shared_memory(64 << 20, 16 * GB)  # of a container by default
    assert found.verdict == "warn" and "67.1 MB free" in found.found and "4.8 GB" in found.found
    assert "--shm-size=4.9g" in found.way_out
    assert check_shared_memory(None, 16 * GB).verdict == "warn"
    assert check_shared_memory(5 * GB, 16 * GB).verdict == "ok"
    assert check_shared_memory(12 * GB, 1000 * GB).verdict == "ok"  # Ray takes what is there


def test_open_files():
    assert check_open_files(1024, 1024).verdict == "warn" and "ulimit -n" in check_open_files(1024, 1024).way_out
    assert check_open_files(1024, 65536).verdict == "ok"  # Ray raises it
    assert check_open_files(1024, -1).verdict == check_open_files(-1, -1).verdict == "ok"


# What a run takes of it


def test_bubblewrap_or_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nowhere = {"engine_url": "unix:///nowhere/docker.sock"}
    found = check_sandbox(BackendOptions(**nowhere))
    assert found.verdict == "ok" and "process, bubblewrap works; docker is not used: " in found.found
    found = check_sandbox(BackendOptions(backend="docker", **nowhere))
    assert found.verdict == "bad" and "/nowhere/docker.sock" in found.found and "diffrl sandbox build" in found.way_out
    monkeypatch.setenv("PATH", str(tmp_path))
    found = check_sandbox(BackendOptions(**nowhere))
    assert found.verdict == "bad" and "bwrap is not on PATH" in found.found
    assert "apt-get install bubblewrap" in found.way_out
    found = check_sandbox(BackendOptions(allow_unisolated=True, **nowhere))
    assert found.verdict == "warn" and "this user's rights" in found.found


def test_pods_of_which_some_answer():
    up, down = FakePod(), FakePod()
    down.close()
    with contextlib.closing(up):
        options = BackendOptions(backend="pod", addresses=(up.at, down.at), token=up.token)
        found = check_sandbox(options)
        assert found.verdict == "warn" and f"no sandbox at {down.at}" in found.found and "judge: 1" in found.found
        found = check_sandbox(replace(options, addresses=(up.at,)))
        assert found.verdict == "ok" and found.found == f"pod, {up.at} answer"
    found = check_sandbox(options)
    assert found.verdict == "bad" and up.at in found.found and down.at in found.found


@pytest.mark.docker
def test_an_image_of_this_version(container_engine: str, judge_image: str):
    found = check_sandbox(BackendOptions(image=judge_image, engine_url=container_engine))
    assert found.verdict == "ok"
    assert found.found == f"docker, image {judge_image} with this version's judge {judge_fingerprint()[:12]}"
    found = check_sandbox(BackendOptions(image="nothing:here", backend="docker", engine_url=container_engine))
    assert found.verdict == "bad" and "nothing:here" in found.found


def test_room_on_the_disk(tmp_path: Path):
    enough = check_disk(tmp_path, free=5 * GB + DISK_FLOOR, needed=5 * GB)
    assert enough.verdict == "ok" and "5 GB for checkpoints and models" in enough.found
    little = check_disk(tmp_path, free=5 * GB, needed=5 * GB)
    assert little.verdict == "warn" and "checkpoint.keep" in little.way_out
    assert check_disk(tmp_path, free=5 * GB - 1, needed=5 * GB).verdict == "bad"
    assert check_disk(tmp_path, free=DISK_FLOOR - 1, needed=0).verdict == "warn"


def test_the_disk_of_a_folder_that_is_yet_to_be_made(tmp_path: Path):
    """A 7B model of which only the name is known, in float32 with whole optimizer state: three checkpoints of 12 bytes a
    parameter (two are kept), two models of 4."""
    config = load_config(
        ROOT / "configs/quickstart_sft.yaml",
        ["model.path=/nowhere/DiffuCoder-7B-Base", f"run_dir={tmp_path}/a/b", "optim.muon_lr=null"],
    )
    sizes = sizes_of(config.model)
    assert sizes is not None and sizes.parameters == 7_615_616_512
    assert saved_bytes(config, sizes) == (3 * 12 + 2 * 4) * sizes.parameters
    found = find_disk(config)
    assert f"free at {tmp_path}, " in found.found and "335 GB for checkpoints and models" in found.found
    assert (found.verdict == "bad") == (os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize < 335 * GB)


def test_a_checkpoint_has_the_size_that_is_expected(tuned_model: Path):
    """Of the run that made the model: trained with Muon, which keeps one moment."""
    run = tuned_model.parent
    config = load_config(run / "config.yaml")
    assert isinstance(config, SftConfig) and config.optim.muon_lr is not None
    num = sum(tensor.numel() for tensor in load_state_dict(tuned_model).values())
    sizes = sizes_of(config.model.model_copy(update={"path": str(tuned_model)}))
    assert sizes is not None and sizes.parameters == num
    (folder,) = (run / "checkpoints").glob("step-*")
    written = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert written == pytest.approx(checkpoint_bytes(config, sizes), rel=0.1)


# The run


def by_check(findings: Iterator[Finding]) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for finding in findings:
        found.setdefault(finding.check, []).append(finding)
    return found


@pytest.fixture
def small(tuned_model: Path, problems_file: Path, tmp_path: Path) -> Path:
    """The config of an RL run that can start."""
    file = tmp_path / "rl.yaml"
    file.write_text(dump_config(rl_config(tuned_model, problems_file, tmp_path / "run")))
    return file


def test_a_run_that_can_start(small: Path, problems_file: Path, tmp_path: Path):
    found = by_check(examine(str(small), []))
    assert all(finding.verdict != "bad" for findings in found.values() for finding in findings), found
    (config,) = found["config"]
    assert config.verdict == "ok" and config.found.startswith("ready: 6 problems, ")
    assert [f.found for f in found["data"]] == [
        f"data.path: {problems_file}, 1 file, {problems_file.stat().st_size / 1e6:.3g} MB"
    ]
    assert not (tmp_path / "run").exists()


Called = Callable[..., tuple[int, str]]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Called:
    """`diffrl doctor ARGUMENTS` in this process: exit status, stdout."""

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["diffrl", "doctor", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capsys.readouterr().out

    return call


def test_a_mistake_in_the_config_is_one_bad_line(small: Path, called: Called):
    status, stdout = called(str(small), "method.group_sise=4")
    (line,) = [line for line in stdout.splitlines() if line.startswith("bad")]
    assert status == 1 and "method.group_sise: unknown key, did you mean 'group_size'?" in line and " -> " in line
    assert len([line for line in stdout.splitlines() if line.split()[1] == "sandbox"]) == 1  # the machine is looked at


def test_with_broken_packages_only_the_machine_is_looked_at(small: Path):
    """In a process in which torch cannot be imported."""
    script = "import sys; sys.modules['torch'] = None; from actors.cli import main; main()"
    command = [sys.executable, "-c", script, "doctor", str(small)]
    made = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert made.returncode == 1 and made.stderr == "", made.stderr
    assert re.search(r"^bad  torch       cannot be imported: .* -> make venv", made.stdout, re.MULTILINE)
    assert re.search(r"^warn config      .*rl.yaml was not looked at -> mend", made.stdout, re.MULTILINE)
    assert re.search(r"^ok   sandbox     ", made.stdout, re.MULTILINE)


def test_what_only_the_dry_run_sees(small: Path, called: Called):
    status, stdout = called(str(small), "data.max_prompt_tokens=1")
    (line,) = [line for line in stdout.splitlines() if line.startswith("bad")]
    assert status == 1 and "data.max_prompt_tokens: 1 is less than every prompt" in line
    assert line.endswith(" -> raise it")


def test_data_that_are_not_there(small: Path, tmp_path: Path):
    found = by_check(examine(str(small), [f"data.path={tmp_path}/nothing.jsonl"]))
    assert [f.verdict for f in found["data"] + found["config"]] == ["bad", "bad"]
    (tmp_path / "texts").mkdir()
    config = load_config(ROOT / "configs/diffucoder_7b/pretrain.yaml", [f"data.path={tmp_path}/texts"])
    assert [f.verdict for f in check_data(data_paths(config))] == ["bad"]
    (tmp_path / "texts/a.txt").write_text("a" * 1000)
    (found_there,) = check_data(data_paths(config))
    assert found_there.verdict == "ok" and "1 file, 0.001 MB" in found_there.found


def test_a_cluster_that_does_not_answer(called: Called, monkeypatch: pytest.MonkeyPatch, listening: int):
    """RAY_ADDRESS decides what is looked at; a config's own address goes before it."""
    port = free_port()
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    status, stdout = called("--json")
    rows = {row["check"]: row for row in json.loads(stdout)}
    assert status == 1 and {name for name, row in rows.items() if row["verdict"] == "bad"} == {"ray"}
    assert str(port) in rows["ray"]["found"] and "unset RAY_ADDRESS" in rows["ray"]["way_out"]
    assert "ports" not in rows and "/dev/shm" not in rows  # of a head that nobody starts here
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{listening}")
    status, stdout = called()
    assert status == 0 and re.search(rf"^ok   ray         127.0.0.1:{listening} answers", stdout, re.MULTILINE)


def test_a_low_limit_of_open_files_is_seen():
    """In a process of its own, which has that limit."""
    command = f"ulimit -n 1000; exec {sys.executable} -m actors.cli doctor"
    made = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert made.returncode == 0, made.stdout + made.stderr
    assert re.search(r"^warn open files  1000 \(ulimit -n\), at most 1000 -> ulimit -n 8192", made.stdout, re.MULTILINE)
