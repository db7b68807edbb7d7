"""The real vLLM on CPU beside transformers: log-probs, new weights, `diffrl curate` with it and with its server."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import psutil
import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray.exceptions import RayTaskError
from transformers import PreTrainedModel, Qwen2ForCausalLM

from actors.curate import curate
from actors.vllm_sampler import Generated, VllmWorker
from actors.weights import Weights, put_folder
from diffrl.causal_sampler import open_causal_model, open_causal_tokenizer
from diffrl.config.curate import CurateConfig
from diffrl.data.microcode import microcode_problems
from diffrl.errors import RunStoppedError
from diffrl.models.tiny import tiny_config, train_tokenizer
from diffrl.prompts import build_prompt
from tests.actors.causal_folder import causal_folder
from tests.conftest import free_ports

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM in an environment of its own: make test-vllm"),
]
PROBLEMS = microcode_problems("train", num_prompt_tests=0)[::140][:20]
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCHDYNAMO_DISABLE": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
START_S = 1800


@pytest.fixture(scope="session", autouse=True)
def environment() -> Iterator[None]:
    """Before Ray starts, whose workers inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two random models in float32, far from uniform, with heads of 32, the smallest that vLLM has on CPU."""
    tokenizer = train_tokenizer([build_prompt(problem) for problem in PROBLEMS], 300)
    made = []
    for number in range(2):
        with torch.random.fork_rng():
            torch.manual_seed(number)
            model = Qwen2ForCausalLM(tiny_config(tokenizer, hidden_size=128, num_layers=2, max_positions=512))
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    torch.nn.init.normal_(parameter, std=0.1)
        made.append(tmp_path / f"random{number}")
        model.save_pretrained(made[-1])
        tokenizer.save_pretrained(made[-1])
    return made


def logprobs_of(model: PreTrainedModel, prompt: list[int], ids: tuple[int, ...]) -> torch.Tensor:
    """Of each token, by transformers."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
    return logits.float().log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]


def check(model: PreTrainedModel, prompts: list[list[int]], greedy: list[list[Generated]]) -> None:
    """Greedy completions are transformers', and so are their log-probs."""
    for prompt, (found,) in zip(prompts, greedy, strict=True):
        options: Any = {"do_sample": False, "max_new_tokens": 24}
        ids = torch.tensor([prompt])
        expected = cast(Any, model).generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert list(found.ids) == expected[0, len(prompt) :].tolist()
        assert torch.tensor(found.logprobs) == pytest.approx(logprobs_of(model, prompt, found.ids), abs=1e-5)


def test_an_engine_in_a_ray_actor_is_transformers_also_after_new_weights(ray_cluster, folders: list[Path]):
    tokenizer, models = open_causal_tokenizer(folders[0]), [open_causal_model(f, None, "cpu") for f in folders]
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(5, len(tokenizer), (length,), generator=generator).tolist() for length in (3, 20, 40, 400)
    ]  # the longest fills blocks of the prefix cache
    worker = cast(Any, ray.remote(VllmWorker)).options(num_cpus=1, max_concurrency=16)
    worker = worker.remote(str(folders[0]), dtype="float32", tensor_parallel=1)

    def ask(seeds: list[int], **options: Any) -> list[Any]:
        return [worker.generate.remote(prompt, seeds, options, logprobs=True) for prompt in prompts]

    try:
        assert ray.get(worker.context.remote(), timeout=START_S) == 512
        greedy = {"temperature": 0.0, "max_tokens": 24}
        before = ray.get(ask([0], **greedy))
        check(models[0], prompts, before)
        sampled = ray.get(ask([1, 2], temperature=1.0, max_tokens=24))
        for prompt, found in zip(prompts, sampled, strict=True):
            assert found[0].ids != found[1].ids
            for one in found:
                assert torch.tensor(one.logprobs) == pytest.approx(logprobs_of(models[0], prompt, one.ids), abs=1e-5)
        again = ray.get(ask([2, 1], temperature=1.0, max_tokens=24))
        assert [[one.ids for one in found[::-1]] for found in again] == [[one.ids for one in f] for f in sampled]

        new = put_folder(folders[1], 7, len(tokenizer))
        lacking = replace(new, tensors=replace(new.tensors, entries=new.tensors.entries[1:]))
        with pytest.raises(RayTaskError, match=f"version 7 lack .*{new.tensors.entries[0].name}"):
            ray.get(worker.pull.remote(lacking))
        under_way = worker.generate.remote(
            prompts[1], [0], {"temperature": 0.0, "max_tokens": 300, "ignore_eos": True}, logprobs=True
        )
        assert ray.get(worker.pull.remote(new)) == 7
        after = ray.get(ask([0], **greedy))
        check(models[1], prompts, after)
        assert all(one[0].ids != other[0].ids for one, other in zip(before, after, strict=True))
        (old,) = ray.get(under_way)
        assert len(old.ids) == 300
        expected = logprobs_of(models[0], prompts[1], old.ids)
        assert torch.tensor(old.logprobs) == pytest.approx(expected, abs=1e-5)

        broken = replace(new, tensors=swapped(new))
        with pytest.raises(RayTaskError):
            ray.get(worker.pull.remote(broken))
        with pytest.raises(RayTaskError, match="EngineDead"):  # half loaded: it does not answer
            ray.get(ask([0], **greedy)[0], timeout=60)
    finally:
        ray.kill(worker)


def swapped(weights: Weights) -> Any:
    """Two tensors of different shapes under each other's names."""
    entries = list(weights.tensors.entries)
    other = next(n for n, entry in enumerate(entries) if entry.shape != entries[-1].shape)
    entries[-1], entries[other] = (
        replace(entries[-1], name=entries[other].name),
        replace(entries[other], name=entries[-1].name),
    )
    return replace(weights.tensors, entries=tuple(entries))


@contextmanager
def vllm_server(folder: Path, log: Path) -> Iterator[str]:
    # Beside a Qwen2's config.json, transformers reads a tokenizer.json as if it were Qwen2's own, with other pieces.
    tokenizer = shutil.copytree(folder, log.with_name("tokenizer"), ignore=shutil.ignore_patterns("config.json"))
    (port,) = free_ports(1)
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host=127.0.0.1", f"--port={port}"),
        *(
            f"--model={folder}",
            f"--tokenizer={tokenizer}",
            "--served-model-name=tiny",
            "--dtype=float32",
            "--enforce-eager",
        ),
    ]
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
    try:
        deadline = time.monotonic() + START_S
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        family = [server, *psutil.Process(server.pid).children(recursive=True)] if server.poll() is None else []
        server.terminate()
        server.wait(60)
        for process in family[1:]:  # of a server that ended none is left
            cast(psutil.Process, process).wait(60)


def config_of(tmp_path: Path, out: str, models: dict) -> CurateConfig:
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(asdict(problem)) + "\n" for problem in PROBLEMS))
    data = {"source": "problems", "path": str(path), "num_prompt_tests": 0}
    raw = {"out": str(tmp_path / out), "data": data, "models": models, "sandbox": {"backend": "process"}}
    return CurateConfig.model_validate(raw)


def engines() -> set[int]:
    """Processes of vLLM on this machine that are mine."""
    mine = [process for process in psutil.process_iter(["cmdline", "uids"]) if process.info["uids"].real == os.getuid()]
    return {process.pid for process in mine if "VLLM::" in " ".join(process.info["cmdline"] or ())}


def no_more_than(before: set[int]) -> None:
    deadline = time.monotonic() + 120
    while engines() - before:
        assert time.monotonic() < deadline, "an engine was left behind"
        time.sleep(0.2)


def test_curation_by_vllm_transformers_and_a_server_is_the_same(ray_cluster, tmp_path: Path):
    """Twenty problems at temperature 0: the same completions, numbers of tokens and pass rates, not all of them 0."""
    folder = causal_folder(tmp_path / "causal", PROBLEMS, hidden_size=128, steps=150)
    before = engines()
    greedily = {"num_samples": 1, "temperature": 0.0, "max_tokens": 40}
    with vllm_server(folder, tmp_path / "server.log") as url:
        config = config_of(
            tmp_path,
            "out",
            {
                "engine": {"backend": "vllm", "path": str(folder), "dtype": "float32", **greedily},
                "here": {"backend": "transformers", "path": str(folder), **greedily},
                "there": {"backend": "openai", "url": url, "model": "tiny", **greedily},
            },
        )
        curate(config)
    no_more_than(before)
    rows = pq.read_table(tmp_path / "out" / "inferences.parquet").to_pylist()
    found = {row["id"]: [(i["completion"], i["pass_rate"]) for i in row["inferences"]] for row in rows}
    assert len(found) == 20 and all(len(samples) == 3 for samples in found.values())
    assert [samples for samples in found.values() if len(set(samples)) > 1] == []
    assert sum(samples[0][1] == 1 for samples in found.values()) > 0
    costs = json.loads((tmp_path / "out" / "costs.json").read_text())
    assert len({cost["tokens"] for cost in costs.values()}) == 1 and costs["engine"]["completions"] == 20


def test_an_engine_that_cannot_start_is_one_line(ray_cluster, folders: list[Path], tmp_path: Path):
    (folders[0] / "model.safetensors").write_bytes(b"cut off")
    model = {"backend": "vllm", "path": str(folders[0]), "num_samples": 1, "max_tokens": 4}
    with pytest.raises(RunStoppedError, match=r"models\.a: a worker of vLLM failed: .") as refused:
        curate(config_of(tmp_path, "out", {"a": model}))
    assert len(str(refused.value).splitlines()) == 1
