"""Configs: every file loads, defaults are the published recipe, and every error is one line with a way out."""

import functools
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
OTHERS = [
    path for path in FILES if path.stem.endswith(("curate", "analysis"))
]  # of no stage; their commands' tests load them
CONFIGS = [path for path in FILES if path not in PIPELINES + OTHERS]
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


def test_a_file_s_name_is_said_in_one_line(tmp_path: Path):
    (tmp_path / "a\nb.yaml").write_text("[]")
    for name, said in (("a\nb.yaml", "is not a mapping"), ("\n", "does not exist")):
        assert r"\n" in (message := refusal(tmp_path / name)) and said in message


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
    assert [path.name for path in PIPELINES] == ["causal_pipeline.yaml", "pipeline.yaml", "quickstart_pipeline.yaml"]


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.name)
def test_every_pipeline_has_the_four_stages_and_the_baseline_the_last_two(path):
    pipeline = load_pipeline(path)
    baseline = path.name == "causal_pipeline.yaml"
    assert [config.stage for config in pipeline.stages.values()] == list(STAGES)[2 if baseline else 0 :]
    assert {config.model.family for config in pipeline.stages.values()} == {"causal" if baseline else "diffusion"}
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


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "override: 'train.steps' is not key=value, such as train.steps=20"),
        ("=3", "override: '=3' is not key=value, such as train.steps=20"),
        ("run_dir.x=3", "override: 'run_dir.x=3': run_dir is a value, not a section"),
        ("train.steps.x=3", "override: 'train.steps.x=3': steps is a value, not a section"),
        ("train.steps=[1", "override: 'train.steps=[1': the value is not valid YAML; quote it"),
        ("train.steps={a: 1}", "BASE: train.steps: {'a': 1} must be a valid integer"),
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
