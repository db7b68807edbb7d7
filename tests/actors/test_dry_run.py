"""What `--dry-run` refuses: every message names the field as it is written, its value and a way out, in one line, before
Ray is asked for and before anything is written.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from docker.errors import ImageNotFound

from actors.dry_run import dry_run
from actors.pipeline import run_pipeline
from diffrl.config import RLConfig
from diffrl.config_file import load_config
from diffrl.data.microcode import microcode_problems
from diffrl.data.rows import supervised_shards
from diffrl.errors import ConfigError
from diffrl.models.loading import load_policy_tokenizer
from diffrl.pipeline_file import load_pipeline
from diffrl.run_folder import create_run_folder
from sandbox import container, pod
from tests.diffrl.tiny_folder import tiny_folder

CONTEXT = 256
MODEL = "model: {path: models/whole}\n"
FILES = {
    "rl.yaml": f"""
stage: rl
run_dir: runs/rl
{MODEL}
data: {{path: data/problems.jsonl, num_prompt_tests: 0, max_prompt_tokens: 128}}
sampling: {{completion_tokens: 34, steps: 17, top_p: null}}
train: {{steps: 100, prompts_per_step: 12}}
learner: {{num_ranks: 2}}
sandbox: {{backend: process, allow_unisolated: true}}
report: {{problems: {{source: microcode, split: held_out, limit: 4, num_prompt_tests: 0}}}}
""",
    "pretrain.yaml": f"stage: pretrain\nrun_dir: runs/pretrain\n{MODEL}data: {{path: data/text, sequence_length: 32}}\n",
    "midtrain.yaml": f"stage: midtrain\nrun_dir: runs/midtrain\n{MODEL}data: {{path: data/text, sequence_length: 32}}\n",
    "sft.yaml": f"""
stage: sft
run_dir: runs/sft
{MODEL}
data: {{path: data/chats.jsonl, max_prompt_tokens: 64, completion_tokens: 64}}
train: {{batch_size: 2}}
""",
    "pipeline.yaml": """
run_dir: runs/all
stages:
  text: {config: pretrain.yaml}
  tuned: {config: sft.yaml}
  rl: {config: rl.yaml}
evaluation:
  problems: {path: data/problems.jsonl, num_prompt_tests: 0}
  sandbox: {backend: process, allow_unisolated: true}
""",
    "not_yaml.yaml": "stage: rl\n  data: ][",
    "list.yaml": "- stage: rl",
    "empty.yaml": "",
    "word.yaml": "rl",
    "no_stage.yaml": "data: {}",
    "code.yaml": "a: !!python/object/apply:os.getcwd []",
    "deep.yaml": "[" * 2_000,
    "no_date.yaml": "stage: rl\nrun_dir: 2026-99-99\n",
    "no_data.yaml": "stage: rl",
    "data/text/a.txt": "def f(x):\n    return x + 3\n" * 40,
    "data/cut.jsonl": '{"id": "a"\n',
    "data/no_tests.jsonl": json.dumps({"id": "a/1", "prompt": "Add.", "prompt_tests": [], "reward_tests": []}) + "\n",
    "data/short.jsonl": json.dumps({"id": "a/1", "prompt": "Add.", "prompt_tests": [], "reward_tests": ["f(1)"]})
    + "\n",
    "data/empty.jsonl": "\n",
    "data/a.csv": "a,b\n",
    "data/nothing.txt": "",
    "data/chats.jsonl": json.dumps({"prompt": "Add 3.", "completion": "x + 3"}) + "\n" * 4,
    "data/strangers.jsonl": json.dumps({"question": "Add 3."}) + "\n",
    "runs/mine/thesis.txt": "years of work",
    "runs/newer/run.json": '{"schema_version": 99}',
    "runs/file": "",
}
MODELS: dict[str, Callable[[Path], object]] = {
    "no_config": lambda folder: (folder / "config.json").unlink(),
    "cut_config": lambda folder: (folder / "config.json").write_text("{cut"),
    "no_object": lambda folder: (folder / "config.json").write_text("[]"),
    "other_kind": lambda folder: change(folder / "config.json", model_type="gpt2"),
    "no_number": lambda folder: change(folder / "config.json", hidden_size="wide"),
    "no_heads": lambda folder: change(folder / "config.json", num_attention_heads=0),
    "deeper": lambda folder: change(folder / "config.json", num_hidden_layers=3),
    "wider": lambda folder: change(folder / "config.json", intermediate_size=64),
    "scaled": lambda folder: change(folder / "config.json", rope_scaling={"type": "linear"}),
    "no_weights": lambda folder: (folder / "model.safetensors").unlink(),
    "cut_weights": lambda folder: os.truncate(folder / "model.safetensors", 3000),
    "cut_index": lambda folder: (folder / "model.safetensors.index.json").write_text("{cut"),
    "no_part": lambda folder: change(folder / "model.safetensors.index.json", weight_map={"a": "b.safetensors"}),
    "no_tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "cut_tokenizer": lambda folder: (folder / "tokenizer.json").write_text("[]"),
    "no_mask": lambda folder: change(folder / "tokenizer_config.json", mask_token=None),
    "no_end": lambda folder: change(folder / "tokenizer_config.json", eos_token=None),
    "no_template": lambda folder: (folder / "chat_template.jinja").unlink(),
}


def change(file: Path, **values: object) -> None:
    raw = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({key: value for key, value in {**raw, **values}.items() if value is not None}))


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Configs with all that they name, and much that is damaged."""
    house = tmp_path_factory.mktemp("house")
    for name, text in FILES.items():
        (house / name).parent.mkdir(parents=True, exist_ok=True)
        (house / name).write_text(text)
    problems = microcode_problems("train", num_prompt_tests=0)[:20]
    (house / "data" / "problems.jsonl").write_text("".join(json.dumps(asdict(p)) + "\n" for p in problems))
    whole = tiny_folder(house / "models" / "whole", max_positions=CONTEXT)
    for name, damage in MODELS.items():
        damage(shutil.copytree(whole, house / "models" / name))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(house)
        config = load_config("pretrain.yaml")
        assert not isinstance(config, RLConfig)
        for name, options in {"shards": [], "long_shards": ["data.sequence_length=300"], "cut_shards": []}.items():
            made = load_config("pretrain.yaml", options)
            assert not isinstance(made, RLConfig)
            supervised_shards(made, load_policy_tokenizer(config.model), house / "data" / name)
        next((house / "data" / "cut_shards").glob("*.parquet")).write_bytes(b"PAR1")
        create_run_folder(load_config("sft.yaml", ["run_dir=runs/begun"]))
    return house


@pytest.fixture(autouse=True)
def world(house: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No Ray, no container engine, no bubblewrap."""
    monkeypatch.chdir(house)
    monkeypatch.setattr(ray, "init", lambda *args, **kwargs: pytest.fail("Ray was started"))
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # by another test
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/docker.sock")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("DIFFRL_SANDBOX_TOKEN", raising=False)
    monkeypatch.setattr(pod, "_CONNECT_S", 0.01)


def refusal(house: Path, check: Callable[[], object]) -> str:
    """The message of a check that starts nothing and writes nothing."""
    before, connected = set(house.rglob("*")), ray.is_initialized()
    with pytest.raises(ConfigError) as caught:
        check()
    assert set(house.rglob("*")) == before and ray.is_initialized() == connected
    message = str(caught.value)
    assert "\n" not in message and len(message) < 800
    return message


def assert_names(message: str, field: str, value: str, way_out: str) -> None:
    """In this order."""
    assert re.search(rf"(^|[ :.]){re.escape(field)}\b.*{re.escape(value)}.*{re.escape(way_out)}", message), message


# (stage, overrides, field, value, way out)
MISTAKES = [
    # Keys and sections
    ("rl", "train.stepz=5", "train.stepz", "unknown key", "did you mean 'steps'?; known: steps, epochs"),
    ("rl", "trian.steps=5", "trian", "unknown key", "did you mean 'train'?; known: stage, run_dir, seed"),
    ("rl", "eval.problems.sauce=x", "eval.problems.sauce", "unknown key", "did you mean 'source'?; known: source, path"),
    ("rl", "zzz=1", "zzz", "unknown key", "known: stage"),
    ("rl", "train=5", "train", "5", "must be a section; set its keys, such as train.steps=..."),
    ("rl", "train=null", "train", "None", "must be a section; set its keys, such as train.steps=..."),
    ("rl", "reward.weights=2", "reward.weights", "2", "must be a section; set its keys, such as reward.weights.NAME=..."),
    ("rl", "report={}", "report.problems", "missing", "set it in the file or as an override report.problems=..."),
    ("rl", "stage=rll", "stage", "'rll'", "must be one of pretrain, midtrain, sft, rl"),
    ("sft", "method={}", "method", "unknown key", "known: run_dir, seed, model"),
    ("midtrain", "data.layout=packed", "data.layout", "unknown key", "known: source, path, sequence_length"),
    # Types and ranges
    ("rl", "train.steps=2.5", "train.steps", "2.5", "must be a valid integer"),
    ("rl", "train.steps=[1,2]", "train.steps", "[1, 2]", "must be a valid integer"),
    ("rl", "train.steps=true", "train.steps", "True", "must be a valid integer"),
    ("rl", "run_dir=5", "run_dir", "5", "must be a valid string; quote it"),
    ("rl", "run_dir=2026-01-02", "run_dir", "2026, 1, 2", "must be a valid string; quote it"),
    ("rl", "seed=99999999999999999999", "seed", "99999999999999999999", "must have at most 64 bits"),
    ("rl", f"seed=0x{'f' * 5000}", "seed", "too large to print", "must have at most 64 bits"),
    ("rl", "seed=-1", "seed", "-1", "must be greater than or equal to 0"),
    ("rl", "optim.lr=0", "optim.lr", "0", "must be greater than 0"),
    ("rl", "optim.lr=fast", "optim.lr", "'fast'", "must be a valid number"),
    ("rl", "optim.lr=.inf", "optim.lr", "inf", "must be a finite number"),
    ("rl", "reward.weights.pass_rate=.nan", "reward.weights.pass_rate", "nan", "must be a finite number"),
    ("rl", "method.clip_low=1.5", "method.clip_low", "1.5", "must be less than 1"),
    ("rl", "method.drop_equal_groups='yes'", "method.drop_equal_groups", "'yes'", "must be a valid boolean"),
    ("rl", "method.group_size=0", "method.group_size", "0", "must be greater than or equal to 1"),
    ("rl", "method.num_pairs=65", "method.num_pairs", "65", "must be less than or equal to 64"),
    ("rl", "sampling.algorithm=entrop", "sampling.algorithm", "'entrop'", "must be 'origin', 'maskgit_plus', 'topk_margin'"),
    ("rl", "data.num_prompt_tests=2", "data.num_prompt_tests", "2", "must be less than or equal to 1"),
    ("rl", "sandbox.slots=0", "sandbox.slots", "0", "must be greater than or equal to 1"),
    ("rl", "sandbox.max_masked_share=1.5", "sandbox.max_masked_share", "1.5", "must be less than or equal to 1"),
    ("rl", "sandbox.backend=none", "sandbox.backend", "'none'", "must be 'auto', 'docker', 'process' or 'pod'"),
    ("rl", "sandbox.addresses=a:1", "sandbox.addresses", "'a:1'", "must be a list, such as [a, b]"),
    ("rl", "learner.zero_stage=4", "learner.zero_stage", "4", "must be 0, 1, 2 or 3"),
    ("rl", "model.lora.targets=[]", "model.lora.targets", "[]", "must have at least 1 item"),
    ("sft", "data.wrong_frac=1.5", "data.wrong_frac", "1.5", "must be less than or equal to 1"),
    ("sft", "train.batch_size=0", "train.batch_size", "0", "must be greater than or equal to 1"),
    ("sft", "data.source=disk", "data.source", "'disk'", "must be 'microcode', 'files', 'hub' or 'shards'"),
    ("sft", "workers.labels={1: a}", "workers.labels.1", "1", "must be a valid string; quote it"),
    ("sft", "workers.labels={group: a b}", "workers.labels", "'a b'", "should contain optional operators and a label value"),
    ("sft", r'workers.labels={group: "\n"}', "workers.labels", r"'\n'", "should contain optional operators"),
    ("rl", "rollout.labels={a b: c}", "rollout.labels", "'a b'", "beginning and ending with an alphanumeric character"),
    ("rl", "judge.labels={diffrl/group: reward}", "judge.labels", "'reward'", "leave it out, or join a cluster (ray.address)"),
    ("rl", "learner.placement=SPREAD", "learner.placement", "'SPREAD'", "must be 'PACK' or 'STRICT_PACK'"),
    ("pretrain", "adaptation.anneal_steps=-1", "adaptation.anneal_steps", "-1", "must be greater than or equal to 0"),
    ("pretrain", "model.path=null model.tiny.num_layers=900", "model.tiny.num_layers", "900", "must be less than or equal to 64"),
    # Names that are looked up
    ("rl", "method.estimator=copled", "method.estimator", "'copled'", "did you mean 'coupled'?; known: causal, coupled, "),
    ("rl", "method.estimator=zzz", "method.estimator", "'zzz'", "is unknown; known: causal, coupled, coupled_normalized"),
    ("rl", "method.objective=tokens", "method.objective", "'tokens'", "did you mean 'token'?; known: sequence"),
    ("rl", "method.t_distribution=beta", "method.t_distribution", "'beta'", "known: cosine, triangular, uniform"),
    ("rl", "method.advantage=group_men", "method.advantage", "'group_men'", "did you mean 'group_mean'?; known: group_mean"),
    ("rl", "reward.weights.pass_rat=1.0", "reward.weights", "'pass_rat'", "did you mean 'pass_rate'?; known: format, pass"),
    ("rl", "model.known_as=Dream-7B", "model.known_as", "'Dream-7B'", "known: DiffuCoder-7B-Base"),
    ("sft", "model.lora.targets=[q_prj]", "model.lora.targets", "'q_prj'", "did you mean 'q_proj'?; known: q_proj"),
    ("rl", r'rollout.labels={"a":"\0"}', "rollout.labels.a", r"'\x00'", "must hold no null and no surrogate characters"),
    ("sft", r'workers.labels={"\uD800":"b"}', "workers.labels", r"'\ud800'", "must hold no null and no surrogate"),
    # Fields together
    ("rl", "method.group_size=1", "method.group_size", "1", "must be 2 or more: the baseline is the mean reward"),
    ("rl", "train.prompts_per_step=11", "train.prompts_per_step", "11", "must be a multiple of learner.num_ranks 2"),
    ("rl", "judge.num_workers=4 judge.max_workers=3", "judge.max_workers", "3", "must be at least num_workers 4; null: always"),
    ("rl", "sampling.steps=35", "sampling.steps", "35", "must be at most sampling.completion_tokens 34: a step reveals"),
    ("rl", "sampling.cache=dual", "sampling.cache", "'dual'", "needs sampling.block_size, such as 32"),
    (
        "rl",
        "sampling.tokens_per_step=2 sampling.entropy_budget=0.1",
        "sampling.tokens_per_step",
        "2",
        "set together with sampling.entropy_budget; give one of them",
    ),
    ("rl", "sampling.algorithm=origin sampling.tokens_per_step=2", "sampling.tokens_per_step", "2", "use entropy"),
    ("rl", "data.path=null", "data.path", "None", "must name a file for source problems"),
    ("rl", "report.problems.source=mbpp", "report.problems.path", "None", "must name a file for source mbpp"),
    ("rl", "reward.weights={}", "reward.weights", "{}", "must name at least one of ['format', 'pass_rate']"),
    ("rl", "method.t_min=0.9", "method.t_min", "0.9", "must be at most t_max 0.8"),
    (
        "rl",
        "method.estimator=coupled_normalized method.t_max=0.7",
        "method.t_min",
        "0.2",
        "must be 1 - t_max 0.7 for coupled_normalized",
    ),
    (
        "rl",
        "method.share_t=batch method.stratify_t=true",
        "method.stratify_t",
        "True",
        "must be false when share_t is batch: one t has nothing to lie evenly among",
    ),
    ("rl", "rollout.max_staleness=-1", "rollout.max_staleness", "-1", "must be greater than or equal to 0"),
    ("rl", "checkpoint.copy_to=nowhere://bucket", "checkpoint.copy_to", "'nowhere://bucket'", "name a folder or an address"),
    ("rl", "learner.keep_batches=-1", "learner.keep_batches", "-1", "must be greater than or equal to 0"),
    ("rl", "eval.every=5", "eval.problems", "None", "must be set when eval.every is"),
    ("rl", "stop.patience=2", "eval.every", "None", "must be set when stop.patience is"),
    (
        "rl",
        "data={source: microcode, split: held_out} report.problems.limit=null",
        "report.problems",
        "'held_out'",
        "must differ from data: what is reported must not be trained on",
    ),
    ("rl", "method.compat=release", "method.advantage", "'group_mean'", "must be leave_one_out with method.compat release"),
    ("rl", "model.tiny.hidden_size=30", "model.tiny.hidden_size", "30", "must be a multiple of num_heads 4"),
    ("rl", "model.tiny.hidden_size=20", "model.tiny.num_heads", "4", "must give heads of an even size"),
    ("rl", "model.tiny.num_kv_heads=3", "model.tiny.num_heads", "4", "must be a multiple of num_kv_heads 3"),
    ("rl", "model.lora.dropout=0.1", "model.lora.dropout", "0.1", "must be 0 in RL: old and new scores"),
    ("rl", "learner.offload=optimizer", "learner.offload", "'optimizer'", "must be none with zero_stage 0: raise zero_stage"),
    (
        "rl",
        "learner.offload=all learner.zero_stage=2",
        "learner.offload",
        "'all'",
        "must be optimizer or none with zero_stage 2: parameters are offloaded by zero_stage 3 only",
    ),
    (
        "rl",
        "learner.compile=true learner.zero_stage=3",
        "learner.compile",
        "True",
        "must be false with zero_stage 3, whose hooks gather parameters around every layer",
    ),
    ("rl", "model.dtype=bfloat16", "learner.zero_stage", "0", "must be 1, 2 or 3 with model.dtype bfloat16"),
    (
        "rl",
        "method.reference_mix=0.6 method.reference_refresh_steps=null",
        "method.reference_refresh_steps",
        "None",
        "must be set with reference_mix 0.6",
    ),
    ("rl", "reference.mode=adapter_off", "reference.mode", "'adapter_off'", "must be actor without model.lora"),
    (
        "rl",
        "reference.mode=adapter_off model.lora={}",
        "method.reference_refresh_steps",
        "64",
        "must be null with reference.mode adapter_off: the base is the reference",
    ),
    ("rl", "sandbox.backend=pod", "sandbox.addresses", "[]", "must name a host:port with backend pod"),
    ("rl", "sandbox.backend=pod sandbox.addresses=[a:1,b]", "sandbox.addresses", "'b'", "must be host:port"),
    ("rl", "sandbox.backend=pod sandbox.addresses=[a:70000]", "sandbox.addresses", "'a:70000'", "must be host:port"),
    ("rl", "sandbox.addresses=[a:1]", "sandbox.backend", "'process'", "must be pod when addresses are given"),
    ("rl", "sandbox.token_file=t", "sandbox.backend", "'process'", "must be pod when token_file is given"),
    ("rl", "sandbox.runtime=runsc", "sandbox.backend", "'process'", "must be docker when runtime is given"),
    ("rl", "sandbox.wall_s=1.5", "sandbox.wall_s", "1.5", "must be at least cpu_s 2"),
    ("sft", "workers.num_workers=3", "train.batch_size", "2", "must be a multiple of workers.num_workers 3"),
    ("sft", "optim.muon_lr=0.02 workers.zero_stage=1", "optim.muon_lr", "0.02", "must be null with workers.zero_stage 1"),
    ("sft", "model.dtype=bfloat16", "workers.zero_stage", "0", "must be 1, 2 or 3 with model.dtype bfloat16"),
    (
        "midtrain",
        "optim.warmup_ratio=0.1 optim.warmup_steps=5",
        "optim.warmup_steps",
        "5",
        "must be left out when warmup_ratio is set",
    ),
    ("pretrain", "data.path=null", "data.path", "None", "must name a file or folder for source text"),
    ("sft", "data.path=null", "data.path", "None", "must name a file, a folder or a data set for source files"),
    # What this machine lacks, and what Ray refuses
    ("rl", "rollout.gpus_per_worker=99", "rollout.gpus_per_worker", "99", "join a cluster (ray.address) or set"),
    ("sft", "workers.gpus_per_worker=99", "workers.gpus_per_worker", "99", "set workers.gpus_per_worker to 0"),
    ("rl", "learner.gpus_per_rank=1.5", "learner.gpus_per_rank", "1.5", "must be a whole number, or at most 1"),
    ("rl", "judge.cpus_per_worker=1e-9", "judge.cpus_per_worker", "1e-09", "must be 0, or at least 0.0001"),
    ("sft", "workers.cpus_per_worker=1e300", "workers.cpus_per_worker", "1e+300", "and at most 1e+06"),
    # Sandboxes that cannot be used
    ("rl", "sandbox.allow_unisolated=false", "sandbox.backend", "process", "run `apt-get install bubblewrap`, or set"),
    ("rl", "sandbox.backend=auto sandbox.allow_unisolated=false", "sandbox.backend", "process", "run `apt-get install"),
    ("rl", "sandbox.backend=docker", "sandbox.backend", "docker.sock", "start Docker, which backend docker needs, or set"),
    (
        "rl",
        "sandbox.backend=pod sandbox.addresses=[127.0.0.1:1]",
        "sandbox.token_file",
        "None",
        "must name a file with the pods' token, or set DIFFRL_SANDBOX_TOKEN",
    ),
    (
        "rl",
        "sandbox.backend=pod sandbox.addresses=[127.0.0.1:1] sandbox.token_file=nowhere",
        "sandbox.token_file",
        "'nowhere'",
        "name a text file",
    ),
    (
        "rl",
        "sandbox.backend=pod sandbox.addresses=[127.0.0.1:1] sandbox.token_file=rl.yaml",
        "sandbox.addresses",
        "127.0.0.1:1",
        "start one there, or give another host:port",
    ),
    (
        "rl",
        "sandbox.backend=pod sandbox.addresses=[sandbox.invalid:7010] sandbox.token_file=rl.yaml",
        "sandbox.addresses",
        "sandbox.invalid:7010",
        "the name does not resolve",
    ),
    # Data
    ("rl", "data.path=data/gone.jsonl", "data.path", "data/gone.jsonl", "check the path"),
    ("rl", "data.path=data/a.csv", "data.path", "data/a.csv", "give a .jsonl, .jsonl.gz, .json or .parquet file"),
    ("rl", "data.path=data/cut.jsonl", "data.path", "data/cut.jsonl line 1", "mend or remove the line"),
    ("rl", "data.path=data/no_tests.jsonl", "data.path", "problem a/1", "leave it out, or set num_prompt_tests to 0"),
    ("rl", "data.path=data/empty.jsonl", "data.path", "data/empty.jsonl", "give a file with one a line"),
    ("rl", "data.source=mbpp", "data.path", "data/problems.jsonl", "field 'code' is missing"),
    (
        "rl",
        "eval.every=5 eval.problems.path=data/gone.jsonl",
        "eval.problems.path",
        "data/gone.jsonl",
        "check the path",
    ),
    (
        "rl",
        "report.problems={source: humaneval, path: data/gone.jsonl}",
        "report.problems.path",
        "data/gone.jsonl",
        "check the path",
    ),
    ("rl", "data.max_prompt_tokens=2", "data.max_prompt_tokens", "2", "is less than every prompt of the data needs"),
    ("rl", "data.max_prompt_tokens=30 data.path=data/short.jsonl", "data.max_prompt_tokens", "30 is too small", "raise it"),
    ("sft", "data.path=data/gone.jsonl", "data.path", "data/gone.jsonl", "give a file or a folder"),
    ("sft", "data.path=data/a.csv", "data.path", "data/a.csv", "must end with .jsonl or .parquet"),
    ("sft", "data.path=data/cut.jsonl", "data.path", "data/cut.jsonl line 1", "mend or remove it, or set data.bad_files"),
    ("sft", "data.path=data/strangers.jsonl", "data.path", "data/strangers.jsonl line 1", "mend or remove it"),
    ("sft", "data.completion_tokens=2", "data", "completion_tokens 2", "make room, or set data.too_long: drop"),
    (
        "sft",
        "data.completion_tokens=200",
        "data.completion_tokens",
        "264 positions",
        f"more than the model's context of {CONTEXT}; be at most {CONTEXT}",
    ),
    ("pretrain", "data.path=data/nothing.txt", "data.path", "data/nothing.txt", "give a file or a folder with data"),
    ("pretrain", "data.path=data/chats.jsonl", "data.path", "data/chats.jsonl line 1", "mend or remove it"),
    ("midtrain", "data.sequence_length=300", "data.sequence_length", "300 positions", f"be at most {CONTEXT}"),
    (
        "rl",
        "sampling.completion_tokens=129",
        "data.max_prompt_tokens + sampling.completion_tokens",
        "128 + 129",
        f"more than the model's context of {CONTEXT}; lower one of them",
    ),
    ("sft", "data.source=shards", "data.path", "data/chats.jsonl", "write it with `diffrl data prepare`"),
    ("sft", "data={source: shards, path: data/shards}", "data.path", "'text'", "prepare them again"),
    ("pretrain", "data={source: shards, path: data/cut_shards}", "data.path", "00000.parquet is missing", "prepare them"),
    ("pretrain", "data={source: shards, path: data/long_shards}", "data.path", "300 positions", "prepare rows of at most"),
    ("sft", "validation.rows=1", "validation.rows", "1", "must be less than the 1 rows of the data"),
    ("sft", "model.path=models/no_template", "model.path", "models/no_template", "add chat_template.jinja"),
    # Models
    ("rl", "model.path=nowhere", "model.path", "nowhere", "give a local Hugging Face folder or leave it out"),
    ("rl", "model.path=rl.yaml", "model.path", "rl.yaml", "give a local Hugging Face folder or leave it out"),
    ("rl", "model.path=models/no_config", "model.path", "no_config", "give a Hugging Face model folder"),
    ("sft", "model.path=models/cut_config", "model.path", "models/cut_config", "download it again"),
    ("rl", "model.path=models/no_object", "model.path", "models/no_object", "download it again"),
    ("rl", "model.path=models/other_kind", "model.path", "'gpt2'", "supported: Dream, DiffuCoder, Qwen2, LLaDA; give"),
    ("rl", "model.path=models/no_number", "model.path", "'hidden_size'", "download it again"),
    ("rl", "model.path=models/no_heads", "model.path", "models/no_heads", "download it again"),
    ("pretrain", "model.path=models/deeper", "model.path", "models/deeper", "take both from one checkpoint"),
    ("pretrain", "model.path=models/wider", "model.path", "models/wider", "take both from one checkpoint"),
    ("rl", "model.path=models/scaled", "model.path", "models/scaled", "set it to null in config.json"),
    ("rl", "model.path=models/no_weights", "model.path", "models/no_weights", "convert the weights to safetensors"),
    ("rl", "model.path=models/cut_weights", "model.path", "models/cut_weights", "download it again"),
    ("rl", "model.path=models/cut_index", "model.path", "models/cut_index", "download it again"),
    ("rl", "model.path=models/no_part", "model.path", "b.safetensors", "download it"),
    ("rl", "model.path=models/no_tokenizer", "model.path", "models/no_tokenizer", "add its tokenizer.json"),
    ("rl", "model.path=models/cut_tokenizer", "model.path", "models/cut_tokenizer", "add its tokenizer.json"),
    ("midtrain", "model.path=models/no_mask", "model.path", "no mask token", "`diffrl data add-tokens models/no_mask OUT`"),
    ("rl", "model.path=models/no_end", "model.path", "no eos token", "add `eos_token` to its tokenizer_config.json"),
    ("rl", "method.estimator=causal", "method.estimator", "'causal'", "be one for a model of model.family diffusion"),
    ("rl", f"model.path={'m' * 300}", "model.path", "mmm", "name another"),
    # The run's folder
    ("rl", "run_dir=runs/mine", "run_dir", "runs/mine", "choose another run_dir"),
    ("sft", "run_dir=runs/newer", "run_dir", "schema_version 99", "choose another run_dir, move the folder away"),
    ("rl", "run_dir=models", "run_dir", "models/whole", "would be moved aside; choose another run_dir"),
    ("rl", "run_dir=runs/file", "run_dir", "runs/file", "choose another run_dir"),
    ("pretrain", "run_dir=runs/file/new", "run_dir", "runs/file/new cannot be made", "choose another run_dir"),
    ("sft", f"run_dir=runs/{'r' * 300}", "run_dir", "rrr", "name another"),
    (
        "rl",
        "run_dir=runs/mine model.path=models/Dream-v0-Base-7B",  # one that is known and not here
        "run_dir",
        "runs/mine",
        "choose another run_dir",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "overrides", "field", "value", "way_out"), MISTAKES, ids=lambda text: text[:40])
def test_mistakes_are_named(house: Path, stage: str, overrides: str, field: str, value: str, way_out: str):
    split = re.split(r" (?=[a-z_.]+=)", overrides)
    message = refusal(house, lambda: dry_run(load_config(f"{stage}.yaml", split)))
    assert_names(message, field, value, way_out)


@pytest.mark.parametrize(
    ("overrides", "field", "value", "way_out"),
    [
        ("stages.tunde.optim.lr=1", "override", "'tunde'", "did you mean 'tuned'?; known: text, tuned, rl"),
        ("stages.tuned.optim.lrr=1", "optim.lrr", "unknown key", "did you mean 'lr'?"),
        ("stages.tuned.run_dir=x", "stages.tuned.overrides.run_dir", "'x'", "leave it out"),
        ("stages.rl.model.path=x", "stages.rl.overrides.model.path", "'x'", "leave it out"),
        ("stages.tuned.config=no.yaml", "stages.tuned.config", "'no.yaml'", "give the path of a YAML file"),
        ("stages.tuned.overrides=5", "stages.tuned.overrides", "5", "must be a section; set its keys"),
        ("stages.tuned.overrides.train={7: 1}", "train.7", "7", "must be a string, as every key; quote it"),
        ("stages={}", "stages", "{}", "must have at least 1 item"),
        ("stages.rl=rl.yaml", "stages.rl", "'rl.yaml'", "must be a section; set its keys, such as stages.rl.config=..."),
        ("stages={text: {confg: a}}", "stages.text.config", "missing", "set it in the file or as an override"),
        ("stages={text: {config: a, overide: {}}}", "stages.text.overide", "unknown key", "did you mean 'overrides'?"),
        ("stage=3", "stage", "unknown key", "did you mean 'stages'?"),
        ("run_dir=null", "run_dir", "None", "must be a valid string"),
        ("run_dir=runs", "run_dir", "runs", "choose another run_dir"),
        ("evaluation.problems.source=microcodes", "evaluation.problems.source", "'microcodes'", "must be 'microcode'"),
        ("evaluation.problems.path=gone.jsonl", "evaluation.problems.path", "gone.jsonl", "check the path"),
        ("evaluation.num_samples=2", "evaluation.num_samples", "2", "must be 1 with temperature 0"),
        ("evaluation.sampling.steps=300", "evaluation.sampling.steps", "300", "must be at most sampling.completion_tokens"),
        ("evaluation.stages=[x]", "evaluation.stages", "'x'", "must be one of text, tuned, rl"),
        ("evaluation.sandbox.backend=docker", "evaluation.sandbox.backend", "docker.sock", "start Docker"),
        (
            "evaluation.num_workers=9 evaluation.gpus_per_worker=11",
            "evaluation.gpus_per_worker",
            "99 GPUs",
            "set evaluation.gpus_per_worker to 0",
        ),
        (
            "evaluation.num_workers=2 evaluation.labels={diffrl/group: rollout}",
            "evaluation.labels",
            "'rollout'",
            "leave it out, or join a cluster",
        ),
        ("stages.tuned.data.path=gone.jsonl", "stages.tuned.data.path", "gone.jsonl", "give a file or a folder"),
        ("stages.rl.data.max_prompt_tokens=2", "stages.rl.data.max_prompt_tokens", "2", "raise it"),
        ("stages.text.model.path=models/no_mask", "stages.text.model.path", "no mask token", "add-tokens"),
    ],
)  # fmt: skip
def test_mistakes_of_a_pipeline_are_named(house: Path, overrides: str, field: str, value: str, way_out: str):
    split = re.split(r" (?=[a-z_.]+=)", overrides)
    message = refusal(house, lambda: run_pipeline(load_pipeline("pipeline.yaml", split), only_plan=True))
    assert_names(message, field, value, way_out)


@pytest.mark.parametrize(
    ("file", "field", "value", "way_out"),
    [
        ("gone.yaml", "config", "gone.yaml", "give the path of a YAML file, such as configs/quickstart.yaml"),
        ("data", "config", "data", "give the path of a YAML file"),
        (f"{'c' * 300}.yaml", "config", "ccc", "give a file that can"),
        ("not_yaml.yaml", "not_yaml.yaml", "not valid YAML", "line 2"),
        ("no_date.yaml", "no_date.yaml", "not valid YAML", "month must be in 1..12"),
        ("list.yaml", "list.yaml", "[{'stage': 'rl'}]", "write `stage: rl` and further keys"),
        ("empty.yaml", "empty.yaml", "None", "write `stage: rl` and further keys"),
        ("word.yaml", "word.yaml", "'rl'", "write `stage: rl` and further keys"),
        ("no_stage.yaml", "stage", "None", "must be one of pretrain, midtrain, sft, rl"),
        ("code.yaml", "code.yaml", "not valid YAML", "python/object"),
        ("deep.yaml", "deep.yaml", "not valid YAML", "recursion"),
        ("models/whole/model.safetensors", "models/whole/model.safetensors", "not valid YAML", "mend the file"),
        ("no_data.yaml", "data", "missing", "set it in the file or as an override data=..."),
        ("pipeline.yaml", "stages", "a pipeline", "run it with `diffrl pipeline pipeline.yaml`"),
    ],
)
def test_files_that_cannot_be_used(house: Path, file: str, field: str, value: str, way_out: str):
    assert_names(refusal(house, lambda: dry_run(load_config(file))), field, value, way_out)


def test_an_image_that_is_not_there(house: Path, monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> None:
        raise ImageNotFound(name)

    engine = SimpleNamespace(images=SimpleNamespace(get=missing), close=lambda: None)
    monkeypatch.setattr(container, "engine_of", lambda url: engine)
    config = load_config("rl.yaml", ["sandbox.backend=docker", "sandbox.image=mine:1"])
    assert_names(
        refusal(house, lambda: dry_run(config)), "sandbox.image", "mine:1", "run `diffrl sandbox build`, or name"
    )


@pytest.mark.parametrize(
    ("overrides", "field", "value", "way_out"),
    [
        (
            "optim.lr=1e-4",
            "optim.lr",
            "0.0001 must be 1e-05",
            "change it back, choose another run_dir, or leave --resume out",
        ),
        ("run_dir=runs/mine", "run_dir", "runs/mine", "choose another run_dir"),
        ("run_dir=runs/newer", "run_dir", "schema_version 99", "choose another run_dir"),
    ],
)
def test_what_cannot_be_resumed(house: Path, overrides: str, field: str, value: str, way_out: str):
    config = load_config("sft.yaml", ["run_dir=runs/begun", overrides])
    assert_names(refusal(house, lambda: dry_run(config, resume="auto")), field, value, way_out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train sft.yaml --resume yes", "--resume: 'yes' must be auto"),
        (
            "train sft.yaml --resume auto run_dir=runs/begun seed=3",
            "seed: 3 must be 0, with which the run in runs/begun",
        ),
        ("pipeline pipeline.yaml stages.rl.optim.lr=0", "stages.rl (rl.yaml): optim.lr: 0 must be greater than 0"),
    ],
)
def test_the_command_answers_in_one_line(house: Path, arguments: str, message: str):
    before = set(house.rglob("*"))
    command = [str(Path(sys.executable).with_name("diffrl")), *arguments.split(), "--dry-run"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(command, cwd=house, capture_output=True, text=True, timeout=120, env=environment)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"diffrl: {message}")
    assert result.stderr.endswith("\n") and result.stderr.count("\n") == 1
    assert set(house.rglob("*")) == before


@pytest.mark.parametrize("stage", ["pretrain", "midtrain", "sft", "rl"])
def test_what_the_mistakes_are_made_in_is_right(house: Path, stage: str, capsys: pytest.CaptureFixture[str]):
    before = set(house.rglob("*"))
    dry_run(load_config(f"{stage}.yaml"))
    ready, *estimates = capsys.readouterr().out.splitlines()
    assert ready.startswith("ready: ") and ready.endswith("; nothing was started")
    assert estimates[0].startswith("estimate: ") and set(house.rglob("*")) == before


def test_so_is_the_pipeline(house: Path, capsys: pytest.CaptureFixture[str]):
    run_pipeline(load_pipeline("pipeline.yaml"), only_plan=True)
    assert capsys.readouterr().out.count("ready: ") == 3
