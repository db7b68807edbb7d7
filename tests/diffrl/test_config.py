"""Configs: every file loads, defaults are the published recipe, and every error is one line with a way out."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors import cli
from diffrl.config import STAGES, AnyConfig, MethodConfig, PretrainConfig, RLConfig, SftConfig
from diffrl.config_file import dump_config, load_config, parse_value, validate
from diffrl.data.corpus import microcode_text
from diffrl.errors import ConfigError
from diffrl.models import loading
from diffrl.models.tiny import train_tokenizer
from diffrl.pipeline_file import load_pipeline
from diffrl.rewards import RECIPE_WEIGHTS
from diffrl.sampler import SamplingParams
from diffrl.views import ViewOptions

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
PIPELINES = [path for path in FILES if path.stem.endswith("pipeline")]
CONFIGS = [path for path in FILES if path not in PIPELINES]
SMALLEST = {"stage": "rl", "data": {"source": "microcode"}}
# A config of the quickstart's kind, whose numbers the messages below repeat.
BASE = """
stage: rl
run_dir: runs/base
data: {source: microcode, num_prompt_tests: 0, max_prompt_tokens: 128}
sampling: {completion_tokens: 34, steps: 17, top_p: null}
train: {steps: 100, prompts_per_step: 12}
learner: {num_ranks: 2}
report: {problems: {source: microcode, split: held_out, num_prompt_tests: 0}}
"""


def rl(**sections) -> RLConfig:
    config = validate({**SMALLEST, **sections}, "here")
    assert isinstance(config, RLConfig)
    return config


def refusal(path: str | Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return path

    return write


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("config") / "base.yaml"
    path.write_text(BASE)
    return str(path)


def loaded(path: str, *overrides: str) -> RLConfig:
    config = load_config(path, overrides)
    assert isinstance(config, RLConfig)
    return config


# Files


def test_there_are_configs():
    assert "quickstart.yaml" in [path.name for path in CONFIGS]
    assert [path.name for path in PIPELINES] == ["pipeline.yaml", "quickstart_pipeline.yaml"]


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.name)
def test_every_pipeline_has_the_four_stages(path):
    pipeline = load_pipeline(path)
    assert [config.stage for config in pipeline.stages.values()] == list(STAGES)
    assert parse_value(dump_config(pipeline.config)) == pipeline.config.model_dump(mode="json")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_loads_and_survives_a_round_trip(path, tmp_path):
    config = load_config(path)
    assert set(yaml.safe_load(path.read_text())) <= set(type(config).model_fields)
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    again = load_config(tmp_path / "dumped.yaml")
    assert again == config and type(again) is type(config)
    assert dump_config(again) == dump_config(config)


@pytest.mark.parametrize(
    "raw",
    [
        {**SMALLEST, "optim": {"lr": 1e-6}, "eval": {"every": 5, "problems": {"source": "mbpp", "path": "p"}}},
        {**SMALLEST, "reward": {"weights": {"pass_rate": 1.0}}, "sampling": {"top_k": None, "top_p": None}},
        {"stage": "sft", "data": {"path": "x.jsonl"}, "optim": {"muon_lr": 0.02}},
        {"stage": "midtrain", "data": {"path": "yes"}, "run_dir": "1e-3"},  # strings that look like other things
    ],
)
def test_dump_and_load(raw, tmp_path):
    config = validate(raw, "here")
    (tmp_path / "dumped.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "dumped.yaml") == config


def test_stages():
    supervised = {"data": {"source": "microcode"}}
    expected = {"rl": RLConfig, "sft": SftConfig, "pretrain": PretrainConfig, "midtrain": PretrainConfig}
    for stage, kind in expected.items():
        assert type(validate({"stage": stage, **supervised}, "here")) is kind


# The published recipe


def test_defaults_are_the_published_recipe():
    config = rl()
    method = {
        "estimator": "coupled",
        "group_size": 10,
        "num_iterations": 2,
        "kl_coef": 0.01,
        "clip_low": 0.5,
        "clip_high": 0.5,
        "objective": "token",
        "advantage": "group_mean",
        "scale_by_std": False,
        "drop_equal_groups": False,
        "max_replacements": 0,
        "num_pairs": 1,
        "num_samples": 2,
        "t_min": 0.2,
        "t_max": 0.8,
        "t_distribution": "uniform",
        "share_t": "group",
        "stratify_t": False,
        "share_masks": False,
        "reference_refresh_steps": 64,
        "reference_mix": 1.0,
        "compat": None,
    }
    assert config.method.model_dump() == method
    optim = {
        "lr": 1e-6,
        "beta1": 0.9,
        "beta2": 0.99,
        "weight_decay": 0.1,
        "grad_norm": 0.2,
        "warmup_steps": 0,
        "min_lr_ratio": 0.1,
    }
    assert config.optim.model_dump() == optim
    sampling = {
        "algorithm": "entropy",
        "completion_tokens": 256,
        "steps": 256,
        "temperature": 1.2,
        "top_p": 0.95,
        "top_k": 50,
        "alg_temp": 0.0,
    }
    assert {name: getattr(config.sampling, name) for name in sampling} == sampling
    assert config.sampling.params().is_exact
    assert config.train.model_dump() == {"steps": None, "epochs": 1, "prompts_per_step": 8}
    assert config.data.max_prompt_tokens == 200
    assert config.data.num_prompt_tests == 1  # shown, and therefore not graded
    assert config.reward.weights == {"pass_rate": 2.0, "format": 0.5} == RECIPE_WEIGHTS
    assert not config.reward.shuffle_within_group
    assert config.rollout.max_staleness == 0


def test_the_methods_own_defaults_are_the_same():
    assert MethodConfig().view_options() == ViewOptions()
    custom: dict[str, Any] = {
        "num_pairs": 3,
        "num_samples": 4,
        "t_min": 0.3,
        "t_max": 0.6,
        "t_distribution": "triangular",
        "share_t": "row",
        "stratify_t": True,
        "share_masks": True,
    }
    assert MethodConfig(**custom).view_options() == ViewOptions(**custom)


def test_sampling_params():
    sampling = rl(sampling={"algorithm": "origin", "steps": 7, "temperature": 0.3, "alg_temp": 0.2}).sampling
    expected = SamplingParams(algorithm="origin", steps=7, temperature=0.3, top_p=0.95, top_k=50, alg_temp=0.2)
    assert sampling.params() == expected
    assert sampling.params(0.0).temperature == 0.0


# Values and overrides


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-6", 1e-6),
        ("2E5", 2e5),
        ("-1.5e-4", -1.5e-4),
        (".5", 0.5),
        ("3.", 3.0),
        ("7", 7),
        ("-2", -2),
        ("null", None),
        ("true", True),
        ("[1, 2e-3]", [1, 2e-3]),
        ("{a: 1e2}", {"a": 100.0}),
        ("'1e-6'", "1e-6"),
        ("1e-6x", "1e-6x"),
        ("e-6", "e-6"),
        ("runs/a", "runs/a"),
    ],
)
def test_values(text, value):
    got = parse_value(text)
    assert got == value and type(got) is type(value)


def test_overrides(base):
    config = loaded(
        base,
        "train.steps=20",
        "optim.lr=1e-6",
        "sampling.top_k=null",
        "sampling.top_p=0.9",
        "method={group_size: 4, kl_coef: 0.0}",
        "eval.problems.source=microcode",  # sections that the file does not have
        "eval.every=5",
        "run_dir=runs/x=y",
        "report=null",
    )
    assert (config.train.steps, config.train.prompts_per_step) == (20, 12)  # the file's own value stays
    assert config.optim.lr == 1e-6
    assert (config.sampling.top_k, config.sampling.top_p) == (None, 0.9)
    assert (config.method.group_size, config.method.kl_coef) == (4, 0.0)
    assert config.eval.every == 5 and config.eval.problems is not None
    assert config.run_dir == "runs/x=y" and config.report is None


def test_later_overrides_win(base):
    assert loaded(base, "train.steps=3", "train={steps: 4, prompts_per_step: 24}", "train.steps=5").train.steps == 5


def test_an_int_is_a_float_but_never_the_other_way_round(base):
    assert loaded(base, "optim.lr=1").optim.lr == 1.0
    assert "train.steps: 2.0 must be a valid integer" in refusal(base, "train.steps=2.0")
    assert "train.steps: True must be a valid integer" in refusal(base, "train.steps=true")
    assert "run_dir: 5 must be a valid string" in refusal(base, "run_dir=5")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "override: 'train.steps' is not key=value, such as train.steps=20"),
        ("=3", "override: '=3' is not key=value, such as train.steps=20"),
        ("run_dir.x=3", "override: 'run_dir.x=3': run_dir is a value, not a section"),
        ("train.steps.x=3", "override: 'train.steps.x=3': steps is a value, not a section"),
        ("train.steps=[1", "override: 'train.steps=[1': the value is not valid YAML; quote it"),
        ("train=5", "BASE: train: 5 must be a section; set its keys, such as train.steps=..."),
        ("train=null", "BASE: train: None must be a section; set its keys, such as train.steps=..."),
        ("train.steps=[1, 2]", "BASE: train.steps: [1, 2] must be a valid integer"),
        ("train.steps={a: 1}", "BASE: train.steps: {'a': 1} must be a valid integer"),
        ("train.stepz=5", "train.stepz: unknown key, did you mean 'steps'?; known: steps, epochs, prompts_per_step"),
        ("trian.steps=5", "trian: unknown key, did you mean 'train'?; known: stage, run_dir, seed, model, data"),
        ("eval.problems.sauce=x", "eval.problems.sauce: unknown key, did you mean 'source'?; known: source, path"),
        ("zzz=1", "BASE: zzz: unknown key; known: stage"),
        ("stage=rll", "BASE: stage: 'rll' must be one of pretrain, midtrain, sft, rl"),
        ("stage=[rl]", "BASE: stage: ['rl'] must be one of pretrain, midtrain, sft, rl"),
        ("stage=null", "BASE: stage: None must be one of pretrain, midtrain, sft, rl"),
    ],
)
def test_overrides_that_cannot_be_used(override, message, base):
    assert message.replace("BASE", base) in refusal(base, override)


def test_a_wrong_override_does_not_hide_the_file(write):
    path = write("stage: rl\ndata: {source: microcode}\ntrain: {stepz: 5}\noptim: {lr: -1}\n")
    message = refusal(path)
    assert message.startswith(f"{path}: ") and message.endswith("(and 1 more)")


def test_files_that_cannot_be_used(write, tmp_path):
    assert "does not exist; give the path of a YAML file, such as configs/quickstart.yaml" in refusal(tmp_path / "no")
    assert "does not exist" in refusal(tmp_path)  # a folder
    assert "not valid YAML" in refusal(write("stage: rl\n  data: ]["))
    for text in ("", "rl", "- stage: rl"):
        assert "is not a mapping; write `stage: rl` and further keys" in refusal(write(text))
    assert "stage: None must be one of" in refusal(write("data: {}"))
    assert "data: missing; set it in the file or as an override data=..." in refusal(write("stage: rl"))
    assert "not valid YAML" in refusal(write("a: !!python/object/apply:os.getcwd []"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x80")
    assert "not valid YAML" in refusal(tmp_path / "binary")


# Fields, alone and together: the message names the field, the value and a way out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["method.group_size=1"],
            "method.group_size: 1 must be 2 or more: the baseline is the mean reward of the group, "
            "so a completion alone has advantage 0",
        ),
        (["method.group_size=0"], "method.group_size: 0 must be greater than or equal to 1"),
        (["optim.lr=0"], "optim.lr: 0 must be greater than 0"),
        (["optim.lr=fast"], "optim.lr: 'fast' must be a valid number"),
        (["optim.lr=.inf"], "optim.lr: inf must be a finite number"),
        (["reward.weights.pass_rate=.nan"], "reward.weights.pass_rate: nan must be a finite number"),
        (["method.clip_low=1.5"], "method.clip_low: 1.5 must be less than 1"),
        (["method.drop_equal_groups='yes'"], "method.drop_equal_groups: 'yes' must be a valid boolean"),
        (
            ["sampling.algorithm=entrop"],
            "sampling.algorithm: 'entrop' must be 'origin', 'maskgit_plus', 'topk_margin' or 'entropy'",
        ),
        (["data.num_prompt_tests=2"], "data.num_prompt_tests: 2 must be less than or equal to 1"),
        (
            ["train.prompts_per_step=11"],
            "train.prompts_per_step: 11 must be a multiple of learner.num_ranks 2",
        ),
        (
            ["sampling.steps=35"],
            "sampling.steps: 35 must be at most sampling.completion_tokens 34: a step reveals at least one token",
        ),
        (["data.source=mbpp"], "data.path: None must name a file for source mbpp"),
        (["report.problems.source=humaneval"], "report.problems.path: None must name a file for source humaneval"),
        (["report={}"], "report.problems: missing; set it in the file or as an override report.problems=..."),
        (
            ["method.estimator=copled"],
            "method.estimator: 'copled' is unknown, did you mean 'coupled'?; known: causal, coupled, coupled_normalized, "
            "decoupled, full_mask, monte_carlo",
        ),
        (["method.estimator=zzz"], "method.estimator: 'zzz' is unknown; known: causal, coupled, "),
        (["method.objective=tokens"], "method.objective: 'tokens' is unknown, did you mean 'token'?; known: sequence"),
        (
            ["method.t_distribution=beta"],
            "method.t_distribution: 'beta' is unknown; known: cosine, triangular, uniform",
        ),
        (
            ["method.share_t=batch", "method.stratify_t=true"],
            "method.stratify_t: True must be false when share_t is batch: one t has nothing to lie evenly among",
        ),
        (
            ["method.advantage=group_men"],
            "method.advantage: 'group_men' is unknown, did you mean 'group_mean'?; known: group_mean, leave_one_out",
        ),
        (
            ["reward.weights={pass_rat: 1.0}"],
            "reward.weights: 'pass_rat' is unknown, did you mean 'pass_rate'?; known: format, pass_rate",
        ),
        (["reward.weights={}"], "reward.weights: {} must name at least one of ['format', 'pass_rate']"),
        (["reward.weights=2"], "reward.weights: 2 must be a section; set its keys, such as reward.weights.NAME=..."),
        (["method.t_min=0.9"], "method.t_min: 0.9 must be at most t_max 0.8"),
        (
            ["method.estimator=coupled_normalized", "method.t_max=0.7"],
            "method.t_min: 0.2 must be 1 - t_max 0.7 for coupled_normalized",
        ),
        (
            ["rollout.max_staleness=1"],
            "rollout.max_staleness: 1 must be 0: asynchronous rollouts are not available yet",
        ),
        (["eval.every=5"], "eval.problems: None must be set when eval.every is"),
        (["stop.patience=2"], "eval.every: None must be set when stop.patience is"),
        (["method.compat=release"], "method.advantage: 'group_mean' must be leave_one_out with method.compat release"),
        (["model.tiny.hidden_size=30"], "model.tiny.hidden_size: 30 must be a multiple of num_heads 4"),
        (["model.tiny.num_kv_heads=3"], "model.tiny.num_heads: 4 must be a multiple of num_kv_heads 3"),
        (["learner.zero_stage=4"], "learner.zero_stage: 4 must be 0, 1, 2 or 3"),
        (
            ["learner.offload=optimizer"],
            "learner.offload: 'optimizer' must be none with zero_stage 0: raise zero_stage",
        ),
        (
            ["learner.offload=all", "learner.zero_stage=2"],
            "learner.offload: 'all' must be optimizer or none with zero_stage 2: parameters are offloaded by "
            "zero_stage 3 only",
        ),
        (
            ["learner.compile=true", "learner.zero_stage=3"],
            "learner.compile: True must be false with zero_stage 3, whose hooks gather parameters around every layer",
        ),
        (
            ["model.dtype=bfloat16"],
            "learner.zero_stage: 0 must be 1, 2 or 3 with model.dtype bfloat16: stage 0 would sum gradients in bfloat16",
        ),
        (
            ["method.reference_mix=0.6", "method.reference_refresh_steps=null"],
            "method.reference_refresh_steps: None must be set with reference_mix 0.6",
        ),
        (["reference.mode=adapter_off"], "reference.mode: 'adapter_off' must be actor without model.lora"),
        (
            ["reference.mode=adapter_off", "model.lora={}"],
            "method.reference_refresh_steps: 64 must be null with reference.mode adapter_off: the base is the reference",
        ),
        (["sandbox.backend=none"], "sandbox.backend: 'none' must be 'auto', 'docker', 'process' or 'pod'"),
        (["sandbox.backend=pod"], "sandbox.addresses: [] must name a host:port with backend pod"),
        (["sandbox.backend=pod", "sandbox.addresses=[a:1,b]"], "sandbox.addresses: 'b' must be host:port"),
        (["sandbox.addresses=[a:1]"], "sandbox.backend: 'auto' must be pod when addresses are given"),
        (["sandbox.token_file=t"], "sandbox.backend: 'auto' must be pod when token_file is given"),
        (["sandbox.runtime=runsc"], "sandbox.backend: 'auto' must be docker when runtime is given"),
        (["sandbox.slots=0"], "sandbox.slots: 0 must be greater than or equal to 1"),
        (["sandbox.wall_s=1.5"], "sandbox.wall_s: 1.5 must be at least cpu_s 2"),
        (["sandbox.max_masked_share=1.5"], "sandbox.max_masked_share: 1.5 must be less than or equal to 1"),
    ],
)
def test_values_that_cannot_be_used(overrides, message, base):
    assert refusal(base, *overrides).startswith(f"{base}: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stage: pretrain\ndata: {}", "data.path: None must name a file or folder for source text"),
        ("stage: sft\ndata: {}", "data.path: None must name a file, a folder or a data set for source files"),
        ("stage: sft\ndata: {source: microcode, wrong_frac: 1.5}", "data.wrong_frac: 1.5 must be less than or equal"),
        ("stage: sft\ndata: {source: microcode}\nmethod: {}", "method: unknown key; known: run_dir, seed, model"),
    ],
)
def test_supervised_stages(write, text, message):
    path = write(text)
    assert refusal(path).startswith(f"{path}: {message}")


@pytest.mark.parametrize(
    "overrides",
    [
        ["eval.every=5", "eval.problems.source=microcode", "stop.patience=2"],
        ["method.compat=release", "method.advantage=leave_one_out"],
        ["method.estimator=coupled_normalized", "method.t_min=0.3", "method.t_max=0.7"],
        ["train.prompts_per_step=24", "learner.num_ranks=4"],
        ["sampling.steps=34"],
        ["data.source=mbpp", "data.path=somewhere.jsonl"],
        ["sandbox.backend=pod", "sandbox.addresses=[10.0.0.7:7010]", "sandbox.token_file=token"],
        ["sandbox.backend=docker", "sandbox.runtime=runsc"],
    ],
)
def test_the_ways_out_work(overrides, base):
    loaded(base, *overrides)


def test_configs_cannot_be_changed():
    config: AnyConfig = rl()
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # pyright: ignore[reportAttributeAccessIssue]


# The command line


@pytest.fixture
def quick_tokenizer(monkeypatch):
    """Training the tokenizer on all of its text takes seconds, and what is refused here does not depend on it."""
    monkeypatch.setattr(loading, "train_tokenizer", lambda texts, vocab_size: trained_tokenizer())


@functools.cache
def trained_tokenizer():
    return train_tokenizer([microcode_text()[:20_000]], vocab_size=400)


def run_main(monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["diffrl", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method.group_size=1", "method.group_size: 1 must be 2 or more"),
        ("train.stepz=5", "train.stepz: unknown key, did you mean 'steps'?"),
    ],
)
def test_the_command_answers_bad_input_in_one_line(override, message):
    command = [str(Path(sys.executable).with_name("diffrl")), "train", "configs/quickstart.yaml", "--dry-run", override]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env={**os.environ})
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith(f"diffrl: configs/quickstart.yaml: {message}")
    assert result.stderr.endswith("\n") and result.stderr.count("\n") == 1


@pytest.mark.usefixtures("quick_tokenizer")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "config: nowhere.yaml does not exist"),
        (["BASE", "train.steps"], "override: 'train.steps' is not key=value"),
        (["BASE", "data.max_prompt_tokens=2"], "data.max_prompt_tokens: 2 is less than every prompt"),
        (["BASE", "data.source=mbpp", "data.path=nowhere.jsonl"], "nowhere.jsonl"),
        (["BASE", "model.path=nowhere"], "model.path: nowhere is not a folder"),
        (["BASE", f"run_dir={ROOT}"], f"run_dir: {ROOT} exists and is not the folder of a run"),
    ],
)
def test_dry_run_refuses_in_one_line(arguments, message, monkeypatch, capsys, tmp_path, base):
    config, *overrides = [base if argument == "BASE" else argument for argument in arguments]
    first = [f"run_dir={tmp_path / 'run'}", "sandbox.allow_unisolated=true"] if overrides else []
    status, out, err = run_main(monkeypatch, capsys, "train", config, "--dry-run", *first, *overrides)
    assert status == 2 and out == ""
    assert err.startswith("diffrl: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("quick_tokenizer")
def test_dry_run_checks_everything_and_starts_nothing(monkeypatch, capsys, tmp_path, base):
    import ray

    folder = tmp_path / "run"
    monkeypatch.setattr(ray, "init", lambda *a, **k: pytest.fail("Ray was started"))
    arguments = [f"run_dir={folder}", "sandbox.allow_unisolated=true", "train.steps=7"]
    status, out, err = run_main(monkeypatch, capsys, "train", base, "--dry-run", *arguments)
    assert status == 0 and not folder.exists()
    ready, *estimates = out.splitlines()
    assert ready.startswith("ready: ") and ready.endswith(" problems, 7 steps; nothing was started")
    assert estimates[0].startswith("estimate: 1,087,520 parameters")
    assert estimates[-1].startswith("7 steps of 4,080 tokens")  # 12 prompts x 10 completions of 34
    assert err == ""


def test_the_config_command_prints_what_load_reads_back(monkeypatch, capsys, tmp_path, base):
    status, out, err = run_main(monkeypatch, capsys, "config", base, "optim.lr=1e-6")
    assert status == 0 and err == ""
    (tmp_path / "resolved.yaml").write_text(out)
    assert load_config(tmp_path / "resolved.yaml") == loaded(base, "optim.lr=1e-6")
