"""`diffrl judge` as a process of its own: what it prints, and its exit status."""

import json
from pathlib import Path

import pytest

from tests.actors.test_commands import run

TESTS = ["assert f(2) == 4", "assert f(3) == 9", "assert f(-1) == 1"]
CORPUS = [
    {"name": "right", "code": "def f(x): return x * x", "tests": TESTS, "accept": [1.0]},
    {"name": "partial", "code": "def f(x): return x + 2", "tests": TESTS, "accept": [0.6667]},
    {"name": "exits", "code": "import sys\nsys.exit(0)", "tests": TESTS, "accept": [0.0]},
    {"name": "equal to all", "code": "class A:\n    def __eq__(s, o): return True\ndef f(x): return A()", "tests": TESTS,
     "accept": [0]},
]  # fmt: skip


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def judge(*arguments: str, cwd: Path, backend: str = "process", **environment: str):
    return run("diffrl", "judge", "--backend", backend, *arguments, cwd=cwd, timeout=600, **environment)


def test_a_clean_corpus_is_a_table_and_exit_status_0(tmp_path: Path) -> None:
    made = judge("--corpus", write(tmp_path / "corpus.jsonl", *CORPUS), cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    lines = made.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[:-1]] == [row["name"] for row in CORPUS]
    assert "0.6667" in lines[1] and "2 passed, 1 failed" in lines[1]
    summary = "programs 4, false_rewards 0, lost 0, wrong 0, hung 0, survivors 0, next_clean_ok 4"
    assert lines[-1] == summary


def test_what_is_not_as_accepted_is_named_in_json_and_exit_status_1(tmp_path: Path) -> None:
    generous = {"name": "too good", "code": CORPUS[0]["code"], "tests": TESTS, "accept": [0.0, 0.3333]}
    strict = {"name": "too bad", "code": CORPUS[2]["code"], "tests": TESTS, "accept": [1]}
    between = {"name": "between", "code": CORPUS[1]["code"], "tests": TESTS, "accept": [0, 1]}
    corpus = write(tmp_path / "corpus.jsonl", generous, strict, between, CORPUS[0])
    made = judge("--corpus", corpus, "--json", cwd=tmp_path)
    assert made.returncode == 1
    assert json.loads(made.stdout) == {
        "programs": 4,
        "false_rewards": ["too good"],
        "lost": ["too bad"],
        "wrong": ["too good", "too bad", "between"],
        "hung": [],
        "survivors": [],
        "next_clean_ok": 4,
    }


@pytest.mark.docker
@pytest.mark.parametrize("backend", ["docker", "pod"])
def test_other_backends_judge_the_same(backend: str, container_engine: str, judge_image: str, tmp_path: Path) -> None:
    """`--backend pod` without an address starts a pod of the image by itself."""
    corpus = write(tmp_path / "corpus.jsonl", *CORPUS)
    made = judge(
        *("--corpus", corpus, "--json", "--image", judge_image),
        cwd=tmp_path,
        backend=backend,
        DOCKER_HOST=container_engine,
    )
    assert made.returncode == 0, made.stderr
    found = json.loads(made.stdout)
    assert (found["programs"], found["next_clean_ok"], found["wrong"]) == (4, 4, [])


@pytest.mark.docker
def test_the_image_is_built_by_command(container_engine: str, judge_image: str, tmp_path: Path) -> None:
    built = run("diffrl", "sandbox", "build", "--tag", judge_image, cwd=tmp_path, DOCKER_HOST=container_engine)
    assert built.returncode == 0 and built.stdout.startswith("sha256:"), built.stderr


def test_one_program_has_a_line_per_test(tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text("def square(x):\n    return x * x\n")
    (tmp_path / "t.py").write_text("nine = 9\nassert square(3) == nine\nassert square(2) == 5\n")
    made = judge("--solution", "s.py", "--tests", "t.py", cwd=tmp_path)
    assert made.returncode == 1
    passed, failed, summary = made.stdout.splitlines()
    assert passed == "passed         assert square(3) == nine"
    assert failed.startswith("failed         assert square(2) == 5")
    assert summary.startswith("1 of 2 tests passed, high trust, ") and summary.endswith(" process backend")


def test_check_functions_and_scripts_are_found_out(tmp_path: Path) -> None:
    (tmp_path / "s.py").write_text("def square(x):\n    return x * x\n")
    (tmp_path / "t.py").write_text("def check(candidate):\n    assert candidate(3) == 9\n")
    made = judge("--solution", "s.py", "--tests", "t.py", cwd=tmp_path)
    assert made.returncode == 0 and made.stdout.startswith("passed         check_function 1\n"), made.stderr
    (tmp_path / "s.py").write_text("print(int(input()) ** 2)\n")
    (tmp_path / "t.jsonl").write_text('{"stdin": "3", "stdout": "9"}\n{"stdin": "4", "stdout": "9"}\n')
    made = judge("--solution", "s.py", "--tests", "t.jsonl", cwd=tmp_path)
    assert made.returncode == 1
    assert [line.split()[0] for line in made.stdout.splitlines()] == ["passed", "failed", "1"]


REFUSED = {
    "nothing to judge": ([], "give --solution and --tests, or --corpus"),
    "both": (["--solution", "s.py", "--tests", "t.py", "--corpus", "c.jsonl"], "give --solution and --tests, or"),
    "no tests": (["--solution", "s.py", "--tests", "nowhere.py"], "tests: nowhere.py cannot be read"),
    "no corpus": (["--corpus", "nowhere.jsonl"], "corpus: nowhere.jsonl cannot be read"),
    "unknown mode": (["--solution", "s.py", "--tests", "s.py", "--mode", "guess"], "--mode: 'guess' must be one of"),
    "unknown backend": (["--corpus", "c.jsonl", "--backend", "podd"], "backend: 'podd' must be one of"),
    "no token": (["--corpus", "c.jsonl", "--backend", "pod", "--address", "127.0.0.1:1"], "DIFFRL_SANDBOX_TOKEN"),
    "no token file": (["--corpus", "c.jsonl", "--backend", "pod", "--token-file", "nowhere"], "token_file: 'nowhere'"),
    "no engine": (["--corpus", "c.jsonl", "--backend", "docker"], "no container engine answers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_line_and_exit_status_2(name: str, tmp_path: Path) -> None:
    arguments, message = REFUSED[name]
    (tmp_path / "s.py").write_text("def f(x): return x\n")
    (tmp_path / "t.py").write_text("assert f(1) == 1\n")
    write(tmp_path / "c.jsonl", *CORPUS)
    made = judge(*arguments, cwd=tmp_path, DOCKER_HOST="unix:///nowhere/docker.sock", DIFFRL_SANDBOX_TOKEN="")
    assert made.returncode == 2 and made.stdout == ""
    assert made.stderr.startswith("diffrl: ") and made.stderr.count("\n") == 1 and message in made.stderr
