"""`diffrl curate` against a real server, real models and the real judge; killed, resumed, and refused."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from actors.commands import open_engine, open_tokenizer
from actors.completions import seeds_of
from actors.curate import curate
from actors.openai_sampler import OpenAISampler, Pace
from actors.rollout import canvases_of, rollout_of
from diffrl.causal_sampler import Prompt, end_tokens, open_causal_model, open_causal_tokenizer, sample_causal
from diffrl.config.curate import CurateConfig
from diffrl.data.microcode import microcode_problems
from diffrl.data.problems import load_problems
from diffrl.data.sft import fenced
from diffrl.errors import RunStoppedError
from diffrl.prompts import build_prompt, chat_ids
from diffrl.sampler import SamplingParams
from tests.actors.causal_folder import causal_folder, completion, served
from tests.actors.conftest import Called, one_line
from tests.conftest import RayCluster
from tests.diffrl.tiny_folder import tiny_folder

PROBLEMS = microcode_problems("train", num_prompt_tests=0)[::700][:4]
BY_PROMPT = {build_prompt(problem): problem for problem in PROBLEMS}
WRONG = "def f(x):\n    return None"


def answers(body: dict, number: int) -> tuple[int, Any]:
    """The first problem is never solved, the last always, those between by every other seed."""
    place = list(BY_PROMPT).index(body["messages"][0]["content"])
    right = place == 3 or (place > 0 and body["seed"] % 2 == 0)
    program = PROBLEMS[place].solution if right else WRONG
    return 200, completion(f"Here it is:\n{fenced(program or '')}\nDone.")


@pytest.fixture
def data(tmp_path: Path) -> dict:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(asdict(problem)) + "\n" for problem in PROBLEMS))
    return {"source": "problems", "path": str(path), "num_prompt_tests": 0}


def config_of(data: dict, out: Path, models: dict, **sections: Any) -> CurateConfig:
    raw = {"out": str(out), "data": data, "models": models, "sandbox": {"backend": "process"}, **sections}
    return CurateConfig.model_validate(raw)


def openai(url: str, **keys: Any) -> dict:
    return {"backend": "openai", "url": url, "model": "tiny", "num_samples": 4, "max_tokens": 60, **keys}


def written(config: CurateConfig, path: Path) -> str:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return str(path)


def inferences(out: Path) -> dict[str, list[dict]]:
    return {row["id"]: row["inferences"] for row in pq.read_table(out / "inferences.parquet").to_pylist()}


def test_samples_become_inferences_splits_and_instruction_data(data: dict, tmp_path: Path, capsys):
    out = tmp_path / "out"
    with served(answers) as server:
        split = {"by": "thresholds", "hard_max": 0.1, "easy_min": 0.9}
        config = config_of(data, out, {"a": openai(server.url), "b": openai(server.url, num_samples=2)}, split=split)
        curate(config)
        assert len(server.requests) == 4 * (4 + 2)
        assert {body["max_tokens"] for body in server.requests} == {60}
        said = capsys.readouterr().out.splitlines()
        found = inferences(out)
        curate(config)
        assert len(server.requests) == 24 and inferences(out) == found  # nothing is done twice
        curate(config_of(data, out, {"a": openai(server.url)}, split={"by": "quantiles"}))
        assert len(server.requests) == 24  # another split costs nothing
    assert list(found) == [problem.id for problem in PROBLEMS]
    for place, problem in enumerate(PROBLEMS):
        assert [(i["model_name"], i["completion_id"]) for i in found[problem.id]] == [
            *(("a", n) for n in range(4)), *(("b", n) for n in range(2))
        ]  # fmt: skip
        for name, count in (("a", 4), ("b", 2)):
            seeds = seeds_of(config, name, problem)[:count]
            expected = [place == 3 or (place > 0 and seed % (2**31 - 1) % 2 == 0) for seed in seeds]
            mine = [i for i in found[problem.id] if i["model_name"] == name]
            programs = [problem.solution if right else WRONG for right in expected]
            assert [i["completion"].strip() for i in mine] == programs
            assert [i["pass_rate"] == 1 for i in mine] == expected
    assert said[0].startswith("a: 4 problems, 16 completions, 112 tokens in ") and "pass rate" in said[0]
    assert said[2].startswith("1 hard, 2 medium, 1 easy, 3 rows of instruction data")
    assert load_problems("problems", out / "easy.jsonl", num_prompt_tests=0) == PROBLEMS[3:]
    rows = [json.loads(line) for line in (out / "sft.jsonl").read_text().splitlines()]
    assert all(row["completion"] == fenced(BY_PROMPT[row["prompt"]].solution or "") for row in rows)
    assert json.loads((out / "costs.json").read_text())["a"]["tokens"] == 112


def test_a_run_that_is_killed_goes_on(data: dict, tmp_path: Path):
    """kill -9 as soon as there is a shard; nothing is judged twice in the output, nothing is lost."""
    out, rows = tmp_path / "out", []
    for number in range(3):  # twelve problems
        rows += [replace(problem, id=f"{problem.id}/{number}") for problem in PROBLEMS]
    Path(data["path"]).write_text("".join(json.dumps(asdict(problem)) + "\n" for problem in rows))

    def slow(body: dict, number: int) -> tuple[int, Any]:
        time.sleep(0.1)
        return answers(body, number)

    def shards() -> list[Path]:
        return sorted((out / "samples").rglob("??/*.json"))

    with served(slow) as server:
        config = config_of(data, out, {"a": openai(server.url, num_samples=2, concurrency=2)})
        command = [sys.executable, "-m", "actors.cli", "curate", written(config, tmp_path / "c.yaml")]
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
        run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        while run.poll() is None and not shards():
            time.sleep(0.02)
        run.send_signal(signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL and not (out / "inferences.parquet").exists()
        kept = {path: path.read_text() for path in shards()}
        assert 1 <= len(kept) < 12
        half = next(iter(kept)).with_name("0123.json.part")  # it was killed while it wrote
        half.write_text('{"problem_id": "')
        asked = len(server.requests)
        curate(config)
        assert len(server.requests) - asked == 2 * (12 - len(kept))
    assert all(path.read_text() == text for path, text in kept.items()) and len(shards()) == 12
    found = inferences(out)
    assert list(found) == [problem.id for problem in rows]
    assert Counter(len(samples) for samples in found.values()) == {2: 12}


def test_what_a_server_refuses_for_now_is_asked_again(data: dict, tmp_path: Path, monkeypatch):
    failures = [(429, {"error": {"message": "slow down"}}), (500, b"oops"), (200, b"no JSON"), (200, {"choices": []})]

    def moody(body: dict, number: int) -> tuple[int, Any]:
        return failures[number - 1] if number <= len(failures) else answers(body, number)

    monkeypatch.setenv("TINY_KEY", "secret")
    with served(moody) as server:
        server.headers["Retry-After"] = "0"  # heeded
        model = openai(server.url, num_samples=1, concurrency=1, api_key_env="TINY_KEY")
        curate(config_of(data, tmp_path / "out", {"a": model}))
        assert len(server.requests) == 4 + len(failures) and set(server.keys) == {"Bearer secret"}
    assert Counter(len(samples) for samples in inferences(tmp_path / "out").values()) == {1: 4}


def test_a_server_that_stays_away_stops_the_run_and_loses_nothing(data: dict, tmp_path: Path):
    broken = [True]

    def half(body: dict, number: int) -> tuple[int, Any]:
        return (503, {"error": "overloaded"}) if broken[0] and number > 2 else answers(body, number)

    with served(half) as server:
        config = config_of(
            data, tmp_path / "out", {"a": openai(server.url, num_samples=1, concurrency=1, max_retries=1)}
        )
        with pytest.raises(
            RunStoppedError, match=r"models\.a\.url: .* in 2 tries, at last 503 overloaded; .* start the same"
        ):
            curate(config)
        assert len(list((tmp_path / "out" / "samples").rglob("??/*.json"))) == 2
        broken[0], asked = False, len(server.requests)
        curate(config)
        assert len(server.requests) - asked == 2


def test_problems_that_are_refused_are_skipped_unless_all_are(data: dict, tmp_path: Path, capsys):
    def picky(body: dict, number: int) -> tuple[int, Any]:
        if body["messages"][0]["content"] == build_prompt(PROBLEMS[0]):
            return 400, {"error": {"message": "too long"}}
        return answers(body, number)

    with served(picky) as server:
        curate(config_of(data, tmp_path / "out", {"a": openai(server.url, num_samples=1)}))
    assert "a: 4 problems (1 skipped), 3 completions" in capsys.readouterr().out
    assert inferences(tmp_path / "out")[PROBLEMS[0].id] == []
    with served(lambda body, number: (400, {"error": "no seeds"})) as server:
        with pytest.raises(RunStoppedError, match=r"the first 3 problems cannot be sampled.*400 no seeds"):
            curate(config_of(data, tmp_path / "other", {"a": openai(server.url, num_samples=1)}))
        assert not list((tmp_path / "other" / "samples").rglob("??/*.json"))


def test_requests_are_spaced(data: dict, tmp_path: Path):
    times: list[float] = []

    def watched(body: dict, number: int) -> tuple[int, Any]:
        times.append(time.monotonic())
        return answers(body, number)

    with served(watched) as server:
        model = openai(server.url, num_samples=1, concurrency=4, requests_per_minute=300)
        sampler = OpenAISampler(config_of(data, tmp_path, {"a": model}), "a")
        assert [sampled.completions for sampled in sampler.sample(PROBLEMS)] and len(times) == 4
    assert times[-1] - times[0] >= 0.55  # three gaps of 0.2 s
    assert Pace(None).gap_s == 0


def test_a_model_in_this_process_and_behind_a_server_are_the_same(data: dict, tmp_path: Path):
    """At temperature 0, by the backends transformers and openai: the same completions and pass rates, some of them right."""
    folder = causal_folder(tmp_path / "causal", PROBLEMS)
    tokenizer, model = open_causal_tokenizer(folder), open_causal_model(folder, None, "cpu")
    ends = end_tokens(model, tokenizer)
    params = SamplingParams(steps=1, temperature=0.0, top_p=None, top_k=None)

    def greedy(body: dict, number: int) -> tuple[int, Any]:
        ids = chat_ids(tokenizer, BY_PROMPT[body["messages"][0]["content"]])
        options: dict = {"max_tokens": body["max_tokens"], "params": params, "ends": ends, "vocab_size": len(tokenizer)}
        (row,) = sample_causal(model, [Prompt(ids=ids, seed=0)], **options)
        return 200, completion(tokenizer.decode([i for i in row if i not in ends]), len(row))

    greedily = {"num_samples": 1, "temperature": 0.0, "max_tokens": 40}
    with served(greedy) as server:
        here = {"backend": "transformers", "path": str(folder), "batch_size": 3, **greedily}
        curate(
            config_of(data, tmp_path / "out", {"here": here, "there": openai(server.url, **greedily, concurrency=1)})
        )
    found = inferences(tmp_path / "out")
    for one, other in found.values():
        assert (one["completion"], one["pass_rate"]) == (other["completion"], other["pass_rate"])
    assert sum(samples[0]["pass_rate"] == 1 for samples in found.values()) >= 2
    costs = json.loads((tmp_path / "out" / "costs.json").read_text())
    assert costs["here"]["tokens"] == costs["there"]["tokens"] > 0
    short = {**here, "max_tokens": 150}  # its context has 160 positions
    with pytest.raises(RunStoppedError, match="of prompt and max_tokens 150 are more than the model's 160"):
        curate(config_of(data, tmp_path / "short", {"here": short}))


def test_a_diffusion_model_is_sampled_by_rollout_workers(ray_cluster: RayCluster, data: dict, tmp_path: Path):
    folder = tiny_folder(tmp_path / "tiny", max_positions=160)
    model = {"backend": "diffusion", "path": str(folder), "num_samples": 2, "max_tokens": 12, "cpus_per_worker": 0.25}
    config = config_of(data, tmp_path / "out", {"mine": model})
    curate(config)
    tokenizer = open_tokenizer(folder)
    found = inferences(tmp_path / "out")
    for problem in PROBLEMS:
        engine = open_engine(folder, tokenizer, config.models["mine"].params(), max_tokens=1 << 14)
        prompt_P, seeds = np.asarray(chat_ids(tokenizer, problem), dtype=np.int32), seeds_of(config, "mine", problem)
        for canvas in canvases_of(prompt_P, 12, seeds):
            engine.add(canvas)
        rows = [rollout_of(tokenizer, row, completion_tokens=12, index=0, seed=0) for row in engine.run()]
        assert [i["completion"] for i in found[problem.id]] == [row.text for row in rows]
    assert any(text for samples in found.values() for text in [samples[0]["completion"]])


def test_bad_input_is_one_line_before_work_starts(data: dict, tmp_path: Path, called: Called):
    file = str(tmp_path / "c.yaml")

    def refused(model: dict, *said: str, data: dict = data, name: str = "a") -> None:
        raw = {"out": str(tmp_path / "out"), "data": data, "models": {name: model}, "sandbox": {"backend": "process"}}
        Path(file).write_text(yaml.safe_dump(raw))
        one_line(called("curate", file), list(said))
        assert not (tmp_path / "out").exists()

    tiny_folder(tmp_path / "dream")
    with served(answers, models=("tiny", "large")) as server:
        refused(
            openai(server.url, model="tinny"), "models.a.model: 'tinny' is not served by", "mean 'tiny'", "tiny, large"
        )
        refused(openai(server.url, api_key_env="NO_SUCH_KEY"), "models.a.api_key_env", "set it to the server's key")
        Path(file).write_text(yaml.safe_dump({"out": "o", "data": data, "models": {"a": openai(server.url)}}))
        status, said, _ = called("curate", file, "sandbox.backend=process", "--dry-run")
        assert status == 0 and said == "4 problems, 1 models, judged by process: ready\n" and not server.requests
        empty = tmp_path / "empty.jsonl"
        empty.write_text(json.dumps({"id": "a", "prompt": "P", "prompt_tests": [], "reward_tests": []}) + "\n")
        refused(openai(server.url), "problem a has no graded test left", data={**data, "path": str(empty)})
        (tmp_path / "huge.jsonl").write_text('{"id": "' + "x" * (2 << 20) + '"}\n')
        huge = {**data, "path": str(tmp_path / "huge.jsonl"), "max_row_mb": 1}
        refused(openai(server.url), "line 1", "more than 1 MB", data=huge)
        gone = server.url
    refused(openai(gone), f"models.a.url: {gone} does not answer as a server of models", "refused", "start it")
    refused(openai("localhost"), "models.a.url: 'localhost' must begin with http://")
    refused({"backend": "transformers", "path": "no/such"}, "models.a.path: no/such is no model folder")
    refused({"backend": "transformers", "path": str(tmp_path / "dream")}, "models.a.path: ")
    refused({"backend": "diffusion", "path": "no/such"}, "models.a.path: no/such is not a folder")
    refused({"backend": "transformers"}, "models.a.path: None must name a model's folder")
    refused({**openai(gone), "temprature": 1}, "models.a.temprature: unknown key, did you mean 'temperature'?")
    refused({**openai(gone), "temperature": 0.0}, "models.a.num_samples: 4 must be 1 with temperature 0")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed here")
def test_vllm_that_is_not_installed_is_one_line(data: dict, tmp_path: Path, called: Called):
    config = config_of(data, tmp_path / "out", {"a": {"backend": "vllm", "path": str(tmp_path)}})
    made = called("curate", written(config, tmp_path / "c.yaml"))
    one_line(made, ["models.a.backend: vllm is not installed; pip install 'diffrl[vllm]', or use backend openai"])
