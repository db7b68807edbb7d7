"""`diffrl eval --model`: what a model wrote is judged, kept and counted, whatever is sampled together and whoever is killed.

A model whose every token is the digit 7 shows that right texts score: as a number, as a script that prints nothing, and behind
a function that is already whole.
"""

import json
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from actors import evaluate_benchmark as module
from actors.evaluate_benchmark import Journal
from diffrl.benchmarks import benchmark_tasks
from diffrl.models.folders import save_model
from diffrl.models.tiny import tiny_model
from diffrl.prompts import chat_ids
from diffrl.sampler.engine import aligned
from sandbox.types import SandboxError
from tests.actors.conftest import Called, one_line
from tests.conftest import RayCluster
from tests.diffrl.test_problems import write_jsonl
from tests.diffrl.tiny_folder import tiny_folder, tiny_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_layers": 1, "max_positions": 1024}
WHOLE = {
    "task_id": "HumanEval/0",
    "prompt": "def f(x):\n    return 3\n",
    "canonical_solution": "",
    "entry_point": "f",
    "test": "def check(candidate):\n    assert candidate(0) == 3\n",
}
SILENT = {
    "question_id": "silent",
    "question_content": "Write nothing.",
    "public_test_cases": json.dumps([{"input": "", "output": "", "testtype": "stdin"}]),
    "private_test_cases": "[]",
}


def constant_folder(path: Path, word: str | None) -> Path:
    """A model that writes one token for ever; None: padding, so nothing."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(tokenizer, generator=torch.Generator().manual_seed(0), **SIZES)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(0.01)  # not 0: a model must look at all positions
        # Every token looks nearly alike, and one of them is twice as near to all as the others.
        embedding = model.backbone.model.embed_tokens.weight
        embedding += 0.25
        embedding[tokenizer.pad_token_id if word is None else tokenizer.convert_tokens_to_ids(word)] = 0.5
    save_model(model, path)
    tokenizer.save_pretrained(path)
    return path


def gsm8k_file(folder: Path, *answers: str) -> Path:
    rows = [{"question": f"What is {n}?", "answer": f"#### {answer}"} for n, answer in enumerate(answers)]
    write_jsonl(folder / "train.jsonl", *rows[:1] * 8)
    return write_jsonl(folder / "test.jsonl", *rows)


def command(benchmark: str, data: Path, model: Path, out: Path, *more: str) -> list[str]:
    return [
        *("eval", "--benchmark", benchmark, "--data", str(data), "--model", str(model), "--out", str(out)),
        *("--tokens", "4", "--backend", "process", *more),
    ]


def scores(out: Path) -> list[dict]:
    return json.loads((out / "results.json").read_text())["scores"]


def test_right_texts_score_and_all_is_kept(tmp_path: Path, called: Called):
    model = constant_folder(tmp_path / "sevens", "7")
    wrong = {**WHOLE, "task_id": "HumanEval/1", "test": WHOLE["test"].replace("== 3", "== 4")}
    data = write_jsonl(tmp_path / "humaneval.jsonl", WHOLE, wrong)
    sweep = ("--prompt", "completion", "--temperature", "0", "--temperature", "1", "--samples", "2", "--top-k", "1")
    status, stdout, stderr = called(*command("humaneval", data, model, tmp_path / "out", *sweep))
    assert status == 0, stderr
    assert "| 0 | 1 | 50.0 [0.0..100.0] |  | 0.0% | 0 |" in stdout
    assert "| 1 | 2 | 50.0 [0.0..100.0] | 50.0 [0.0..100.0] | 0.0% | 0 |" in stdout
    report = (tmp_path / "out/results.md").read_text()
    assert "| post-processing | 1 |" in report and "Batch invariance: " in report
    rows = pq.read_table(tmp_path / "out/samples.parquet").to_pylist()
    assert [(r["temperature"], r["problem_id"][-1], r["sample_index"]) for r in rows] == [
        *((0.0, "0", 0), (0.0, "1", 0), (1.0, "0", 0), (1.0, "0", 1), (1.0, "1", 0), (1.0, "1", 1))
    ]
    assert {row["text"] for row in rows} == {"7777"} and rows[0]["code"] == WHOLE["prompt"] + "7777"
    assert [row["statuses"] for row in rows[:2]] == [["passed"], ["failed"]]

    data = write_jsonl(tmp_path / "live.jsonl", SILENT)
    status, stdout, stderr = called(*command("livecodebench", data, model, tmp_path / "live", "--prompt", "completion"))
    assert status == 0 and scores(tmp_path / "live")[0]["pass@1"]["mean"] == 1.0, stderr
    data = gsm8k_file(tmp_path, "7,777", "5")
    status, stdout, stderr = called(*command("gsm8k", data, model, tmp_path / "math"))
    assert status == 0 and scores(tmp_path / "math")[0]["pass@1"]["mean"] == 0.5, stderr


def test_a_model_that_writes_nothing_scores_nothing(tmp_path: Path, called: Called):
    model = constant_folder(tmp_path / "silent", None)
    for benchmark, row in (("humaneval", WHOLE), ("livecodebench", SILENT)):
        data = write_jsonl(tmp_path / "rows.jsonl", row)
        for prompt in ("chat", "completion"):
            out = tmp_path / benchmark / prompt
            status, _, stderr = called(*command(benchmark, data, model, out, "--prompt", prompt))
            assert status == 0, stderr
            [score] = scores(out)
            assert (score["pass@1"]["mean"], score["blank_share"], score["num_masked"]) == (0.0, 1.0, 0)
            assert pq.read_table(out / "samples.parquet").to_pylist()[0]["detail"] == "nothing was written"


def sampled_texts(called: Called, folder: Path, name: str, rows: int, *more: str) -> tuple[pa.Table, list[dict]]:
    """Eight problems, greedy and in two samples at temperature 1, in batches of up to so many rows."""
    model, data = folder / "model", folder / "test.jsonl"
    if not model.exists():
        tiny_folder(model, max_positions=1024)
        gsm8k_file(folder, *(str(10**n) for n in range(8)))
    prompts = [chat_ids(tiny_tokenizer(), task.problem) for task in benchmark_tasks("gsm8k", data).tasks]
    width = aligned(max(map(len, prompts)) + 4)
    sweep = ("--temperature", "0", "--temperature", "1", "--samples", "2", "--max-tokens-per-batch", str(rows * width))
    status, _, stderr = called(*command("gsm8k", data, model, folder / name, *sweep, *more))
    assert status == 0, stderr
    return pq.read_table(folder / name / "samples.parquet"), scores(folder / name)


def test_what_is_sampled_in_a_batch_changes_nothing(tmp_path: Path, called: Called):
    one, three, eight = (sampled_texts(called, tmp_path, str(rows), rows) for rows in (1, 3, 8))
    assert one[0].num_rows == 8 + 16 and len(set(one[0]["text"].to_pylist())) > 4
    assert one[0].equals(three[0]) and one[0].equals(eight[0]) and one[1] == three[1] == eight[1]


def test_the_number_of_workers_changes_nothing(
    ray_cluster: RayCluster, tmp_path: Path, called: Called, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "PART", 5)  # so that two workers have parts in turns
    table, found = sampled_texts(called, tmp_path, "here", 3)
    for workers in (1, 2):
        assert sampled_texts(called, tmp_path, f"{workers}", 3, "--workers", str(workers)) == (table, found)


KILLED = """
import os, signal
from actors import evaluate_benchmark as module
from actors.cli import main

write = module.Journal.append

def append(journal, entries):
    write(journal, entries)
    if len(journal.verdicts) >= 20:
        os.kill(os.getpid(), signal.SIGKILL)

module.Journal.append = append
main()
"""


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path: Path, called: Called):
    """kill -9 while it judges; in the end there is one verdict of every sample, and those that were there stand."""
    model = constant_folder(tmp_path / "sevens", "7")
    data = write_jsonl(tmp_path / "rows.jsonl", *({**WHOLE, "task_id": f"HumanEval/{n}"} for n in range(40)))
    arguments = command("humaneval", data, model, tmp_path / "out", "--prompt", "completion")
    journal = tmp_path / "out/journal.jsonl"
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    before = journal.read_bytes()
    whole = [json.loads(line) for line in before[: before.rfind(b"\n") + 1].splitlines()]
    assert 0 < sum("statuses" in entry for entry in whole) < 40
    status, _, stderr = called(*arguments)
    assert status == 0, stderr
    after = [json.loads(line) for line in journal.read_text().splitlines()]
    assert after[: len(whole)] == whole and len(after) == 80
    for kind in ("text", "statuses"):
        assert len({tuple(entry["key"]) for entry in after if kind in entry}) == 40
    assert scores(tmp_path / "out")[0]["pass@1"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "num_problems": 40}
    status, _, stderr = called(*arguments)  # finished: nothing is sampled or judged
    assert status == 0 and stderr == "" and len(journal.read_text().splitlines()) == 80
    one_line(called(*arguments, "--seed", "1"), ["--out", "seed 0", "now it is 1", "another folder"])


def test_a_line_that_was_cut_off_is_written_again(tmp_path: Path):
    path = tmp_path / "journal.jsonl"
    first = {"key": [0.0, "a", 0], "text": "é", "num_tokens": 1, "seed": 3}
    path.write_bytes(json.dumps(first).encode() + b'\n{"key": [0.0, "a", 1], "te')
    with closing(Journal(path)) as journal:
        assert journal.unjudged() == [(0.0, "a", 0)]
        journal.append([{"key": [0.0, "a", 0], "statuses": None}, {"key": [0.0, "b", 0], "statuses": ["passed"]}])
    with closing(Journal(path)) as again:
        assert again.unjudged() == [(0.0, "a", 0)] and again.texts == {(0.0, "a", 0): first}
    assert len(path.read_text().splitlines()) == 3


def test_what_the_judge_fails_on_is_masked_and_judged_again(tmp_path: Path, called: Called, monkeypatch):
    """The judge is broken on purpose for one program, then whole again."""
    model = constant_folder(tmp_path / "sevens", "7")
    data = write_jsonl(tmp_path / "rows.jsonl", WHOLE, {**WHOLE, "task_id": "HumanEval/1"})
    arguments = command("humaneval", data, model, tmp_path / "out", "--prompt", "completion")
    open_really = module.open_sandbox

    def open_broken(options):
        pool = open_really(options)
        judge_really = pool.judge

        def judge(submission):
            if submission.id.startswith("HumanEval/1"):
                raise SandboxError("no room")
            return judge_really(submission)

        pool.judge = judge
        return pool

    with monkeypatch.context() as patch:
        patch.setattr(module, "open_sandbox", open_broken)
        status, stdout, stderr = called(*arguments)
    assert status == 0, stderr
    assert "| 0 | 1 | 100.0 [100.0..100.0] | 0.0% | 1 |" in stdout and "failed on 1 samples" in stdout
    rows = pq.read_table(tmp_path / "out/samples.parquet").to_pylist()
    assert [(row["statuses"], row["detail"]) for row in rows] == [(["passed"], ""), (None, "no room")]
    status, stdout, _ = called(*arguments)
    assert status == 0 and "| 0 | 1 | 100.0 [100.0..100.0] | 0.0% | 0 |" in stdout
    assert scores(tmp_path / "out")[0]["pass@1"]["num_problems"] == 2


BAD = {
    "no tokens": (["--out", "OUT"], ["--tokens", "not given"]),
    "no folder": (["--tokens", "4"], ["--out", "not given"]),
    "k above n": (
        ["--out", "OUT", "--tokens", "4", "--temperature", "1", "--samples", "3", "--k", "4"],
        ["--k: 4", "3 samples"],
    ),
    "k above greedy": (["--out", "OUT", "--tokens", "4", "--samples", "3", "--k", "2"], ["--k: 2", "temperature 0"]),
    "k of 0": (["--out", "OUT", "--tokens", "4", "--k", "0"], ["--k: 0", "at least 1"]),
    "prompt": (["--out", "OUT", "--tokens", "4", "--prompt", "chatt"], ["--prompt: 'chatt'", "chat, completion"]),
    "temperature": (["--out", "OUT", "--tokens", "4", "--temperature", "-1"], ["--temperature: -1", "at least 0"]),
    "temperature twice": (
        ["--out", "OUT", "--tokens", "4", "--temperature", "1", "--temperature", "1"],
        ["--temperature", "twice"],
    ),
    "samples": (["--out", "OUT", "--tokens", "4", "--samples", "0"], ["--samples: 0"]),
    "too long": (["--out", "OUT", "--tokens", "4096"], ["HumanEval/0", "4096 to fill", "more than the 1024"]),
    "benchmark": (
        ["--out", "OUT", "--tokens", "4", "--benchmark", "humanevalplus"],
        ["did you mean 'humaneval_plus'?"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name: str, tmp_path: Path, called: Called):
    options, expected = BAD[name]
    model, data = tiny_folder(tmp_path / "model", max_positions=1024), write_jsonl(tmp_path / "rows.jsonl", WHOLE)
    options = [str(tmp_path / "out") if option == "OUT" else option for option in options]
    arguments = ["eval", "--benchmark", "humaneval", "--data", str(data), "--model", str(model), *options]
    one_line(called(*arguments), expected)
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_chat_template_is_asked_to_complete(tmp_path: Path, called: Called):
    model = constant_folder(tmp_path / "sevens", "7")
    (model / "chat_template.jinja").unlink()
    data = write_jsonl(tmp_path / "rows.jsonl", WHOLE)
    arguments = command("humaneval", data, model, tmp_path / "out")
    one_line(called(*arguments), ["--prompt", "no chat template", "--prompt completion"])
    assert called(*arguments, "--prompt", "completion")[0] == 0
    data = write_jsonl(tmp_path / "bigcode.jsonl", BIGCODE_ROW)
    arguments = command("bigcodebench_instruct", data, model, tmp_path / "big", "--prompt", "completion")
    one_line(called(*arguments), ["--prompt", "bigcodebench_instruct has nothing to complete"])


BIGCODE_ROW = {
    **{"task_id": "BigCodeBench/1", "complete_prompt": "def f():\n", "instruct_prompt": "Write f.", "entry_point": "f"},
    **{"code_prompt": "def f():\n", "canonical_solution": "    return 1", "test": "import unittest\n"},
}
