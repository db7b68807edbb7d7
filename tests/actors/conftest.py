"""A model that solves a few problems now and then: tuned in seconds, good enough for rewards to differ. The command in this
process."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest

from actors.cli import main
from actors.driver import Run
from actors.learner import Learner
from actors.placement import asks_of
from actors.prepare import prepare
from actors.run_start import begin
from actors.stages import train_supervised
from actors.system import System, room_for
from actors.telemetry import Telemetry
from diffrl.config import RLConfig, SftConfig, TelemetryConfig
from diffrl.config_file import validate
from diffrl.data.microcode import microcode_problems
from diffrl.data.sft import fenced
from diffrl.prompts import build_prompt
from diffrl.types import Problem
from tests.conftest import RayCluster

NUM_PROBLEMS = 6
Called = Callable[..., tuple[int, str, str]]
WINDOW = {"max_prompt_tokens": 40, "completion_tokens": 40}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Called:
    """`diffrl ARGUMENTS` in this process: exit status, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["diffrl", *arguments])
        capsys.readouterr()  # of libraries that the test itself has used
        with pytest.raises(SystemExit) as ended:
            main()
        made = capsys.readouterr()
        return int(ended.value.code or 0), made.out, made.err

    return call


def one_line(made: tuple[int, str, str], expected: list[str]) -> None:
    """Exit status 2, nothing on stdout, one line on stderr that holds all of this."""
    status, stdout, stderr = made
    assert status == 2 and stdout == "" and len(stderr.splitlines()) == 1, made
    for text in expected:
        assert text in stderr


@pytest.fixture(scope="session")
def problems() -> list[Problem]:
    """A few problems of different families."""
    everything = microcode_problems("train", num_prompt_tests=0)
    return everything[:: len(everything) // NUM_PROBLEMS][:NUM_PROBLEMS]


@pytest.fixture(scope="session")
def problems_file(problems: list[Problem], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("problems") / "problems.jsonl"
    path.write_text("".join(json.dumps(asdict(p)) + "\n" for p in problems))
    return path


@pytest.fixture(scope="session")
def tuned_model(ray_cluster: RayCluster, problems: list[Problem], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Instruction-tuned on right and wrong programs for those problems; a Hugging Face folder."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2}
    return tune(tmp_path_factory.mktemp("tuned"), problems, {"tiny": sizes}, steps=200)


def tune(folder: Path, problems: list[Problem], model: dict, *, steps: int) -> Path:
    pairs = []
    for index, problem in enumerate(problems):
        assert problem.solution is not None
        wrong = problems[(index + 1) % len(problems)].solution
        assert wrong is not None
        pairs += [(build_prompt(problem), fenced(problem.solution))] * 2 + [(build_prompt(problem), fenced(wrong))]
    data = folder / "sft.jsonl"
    data.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    config = validate(
        {
            "stage": "sft",
            "run_dir": str(folder / "run"),
            "model": model,
            "data": {"source": "files", "path": str(data), **WINDOW},
            "optim": {"lr": 6e-3, "muon_lr": 0.02, "warmup_steps": 10},
            "train": {"steps": steps, "batch_size": 18},
            "workers": {"threads": 1},
        },
        "test",
    )
    assert isinstance(config, SftConfig)
    train_supervised(config)
    return folder / "run" / "model"


def rl_config(model: Path, problems_file: Path, run_dir: Path, /, **sections: dict) -> RLConfig:
    """A small RL run; `sections` replace keys inside the sections of the same name."""
    raw: dict = {
        "stage": "rl",
        "run_dir": str(run_dir),
        "model": {"path": str(model)},
        "data": {
            "source": "problems",
            "path": str(problems_file),
            "num_prompt_tests": 0,
            "max_prompt_tokens": WINDOW["max_prompt_tokens"],
        },
        "sampling": {
            "completion_tokens": WINDOW["completion_tokens"],
            "steps": 10,
            "temperature": 1.0,
            "top_p": None,
            "top_k": None,
        },
        "method": {"group_size": 4},
        "optim": {"lr": 3e-4},
        "train": {"steps": 3, "prompts_per_step": 4},
        "rollout": {"cpus_per_worker": 0.25},
        "judge": {"cpus_per_worker": 0.25},
        "reference": {"cpus": 0.25},
        "learner": {"cpus_per_rank": 0.25},
        "sandbox": {"backend": "process"},  # whatever engine this machine has
    }
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    config = validate(raw, "test")
    assert isinstance(config, RLConfig)
    return config


@contextmanager
def opened(
    config: RLConfig,
    run_class: type[Run] = Run,
    prepare_system: Callable[[System], None] = lambda system: None,
    telemetry_config: TelemetryConfig | None = None,
) -> Iterator[Run]:
    """A run as `actors.driver.train` makes it, of a class of the test's own or with other workers."""
    prepared, start = prepare(config), begin(config, None)
    assert start is not None
    with (
        room_for(prepared.config, asks_of(prepared.config)),
        Learner(prepared.config, prepared.tokenizer, prepared.num_steps) as learner,
        System(prepared.config, prepared.tokenizer) as system,
        Telemetry(start.folder, prepared.num_steps, config=telemetry_config) as telemetry,
    ):
        prepare_system(system)
        yield run_class(prepared, start, system, learner, telemetry)
