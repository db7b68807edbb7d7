"""Any config whatever either resolves to a plan or is refused in one line that names a field of it."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from actors.pipeline import resources
from actors.prepare import check_devices, said_in_a_line
from diffrl.config import STAGES, AnyConfig, ModelConfig, RLConfig
from diffrl.config.pipeline import PipelineConfig, StageEntry
from diffrl.config_file import dump_config, parse_value, validate
from diffrl.errors import ConfigError, shown
from diffrl.estimate import describe, estimate
from diffrl.manifests import stage_config
from diffrl.models.sizes import sizes_of
from diffrl.pipeline_file import load_pipeline
from diffrl.run_folder import check_run_folder
from tests.diffrl.config_strategy import raw_section, with_mistakes

KINDS = [*STAGES, "pipeline"]
SHARE = 0.1  # of either outcome, at least
SIZES = sizes_of(ModelConfig(path="Dream-v0-Base-7B"))


def stage_raws(stage: str) -> st.SearchStrategy[dict[str, Any]]:
    return raw_section(STAGES[stage], stage=stage)


@st.composite
def pipeline_raws(draw: Any) -> list[dict[str, Any]]:
    """The pipeline, and its stages' files 1.yaml and 2.yaml."""
    files: list[dict[str, Any]] = []
    names = draw(
        st.lists(
            st.sampled_from(["first", "second", "2nd"]),
            min_size=1,
            max_size=draw(st.sampled_from([1, 1, 2])),
            unique=True,
        )
    )
    entries = {}
    for name in names:
        files.append(draw(stage_raws(draw(st.sampled_from(list(STAGES))))))
        entries[name] = {
            "config": f"{len(files)}.yaml",
            **draw(st.sampled_from([{}, {"overrides": {"train.steps": 3}}])),
        }
    if draw(st.sampled_from([True, *[False] * 9])):
        entries["drawn"] = draw(raw_section(StageEntry))
    return [draw(raw_section(PipelineConfig, stages=entries, run_dir="runs/new")), *files]


def plan(config: AnyConfig) -> None:
    """What a dry run works out without a model or data. Raises ConfigError."""
    with said_in_a_line(config):
        check_run_folder(Path(config.run_dir), config.model.path)
        check_devices(config)
    assert SIZES is not None
    found = estimate(config, SIZES, num_steps=1000)
    assert all(line and "\n" not in line for line in describe(config, found, SIZES))
    assert found.memory.gpu > 0 and found.tokens_per_step > 0 and stage_config(config)["stage"] == config.stage
    assert resources(config).endswith(("CPUs", "GPUs"))
    if isinstance(config, RLConfig):
        assert config.max_tokens_per_batch >= config.tokens_per_group > 0 and config.groups_in_flight >= 2
        assert config.num_gpus >= 0 and config.num_reference_workers >= 0
        assert config.sampling.params().exactly().is_exact and config.method.view_options().num_pairs >= 1


def paths_of(raw: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all that a raw config holds, as errors write them."""
    items = raw.items() if isinstance(raw, Mapping) else enumerate(raw) if isinstance(raw, list) else ()
    for key, value in items:
        text = str(key)
        path = prefix + (text if text.isprintable() and 0 < len(text) <= 100 else shown(text))
        yield path
        yield from paths_of(value, f"{path}.")


def model_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from model_paths(part, f"{prefix}{name}.")


MODEL_PATHS = {"stage", *(path for model in {*STAGES.values(), PipelineConfig} for path in model_paths(model))}


def assert_says(error: ConfigError, *raws: Any, origin: str | None = None) -> None:
    message = str(error)
    assert "\n" not in message and len(message) < 2000
    assert origin is None or message.startswith(f"{origin}: ")
    found = {path for raw in raws for path in paths_of(raw)}
    entries = {f"{path}.{name}" for path in found if path.startswith("stages.") for name in StageEntry.model_fields}
    overridden = {
        path.partition(".overrides.")[2] for path in found if ".overrides." in path
    }  # keys of the stage's own
    fields = MODEL_PATHS | found | entries | overridden
    start = "" if origin is None else f"{origin}: "
    assert any(f"{start}{field}: " in message for field in fields), message
    assert len(message.partition(": ")[2]) > 10


def resolve(raw: dict[str, Any], *, as_text: bool) -> str:
    """What becomes of a stage's raw config."""
    try:
        config = validate(raw, "generated")
    except ConfigError as error:
        assert_says(error, raw, origin="generated")
        return "refused"
    # YAML takes five times as long as all the rest, so of many configs some go through it.
    text = dump_config(config) if as_text else None
    again = validate(parse_value(text) if text else config.model_dump(mode="json"), "again")
    assert again == config and type(again) is type(config)
    try:
        plan(config)
    except ConfigError as error:
        assert_says(error, raw)
        return "refused here"  # by what this machine lacks
    return "resolved"


def resolve_pipeline(raws: list[dict[str, Any]], folder: Path) -> str:
    for number, raw in enumerate(raws):
        (folder / f"{number}.yaml").write_text(yaml.safe_dump(raw))
    try:
        pipeline = load_pipeline(folder / "0.yaml")
        for config in pipeline.stages.values():
            plan(config)
    except ConfigError as error:
        assert_says(error, *raws)
        return "refused"
    assert parse_value(dump_config(pipeline.config)) == pipeline.config.model_dump(mode="json")
    if pipeline.config.evaluation is not None:
        assert pipeline.config.evaluation.params().is_exact and pipeline.config.evaluation.result_keys()
    return "resolved"


def outcomes(kind: str, folder: Path, number: int, *, text_every: int = 1) -> Counter[str]:
    counts: Counter[str] = Counter()
    raws = with_mistakes(pipeline_raws() if kind == "pipeline" else stage_raws(kind))

    def become(raw: Any) -> str:
        if kind == "pipeline":
            return resolve_pipeline(raw, folder)
        return resolve(raw, as_text=counts.total() % text_every == 0)

    @settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(raws)
    def check(raw: Any) -> None:
        counts[become(raw)] += 1

    check()
    return counts


def assert_both(counts: Counter[str]) -> None:
    for outcome in ("resolved", "refused"):
        assert counts[outcome] >= SHARE * counts.total(), counts


@pytest.mark.parametrize("kind", KINDS)
def test_some_configs(kind: str, tmp_path: Path):
    counts = outcomes(kind, tmp_path, 60)
    assert counts.total() >= 60
    assert_both(counts)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_configs(kind: str, tmp_path: Path):
    counts = outcomes(kind, tmp_path, math.ceil(10_500 / len(KINDS)), text_every=5)
    print(f"{kind}: {dict(counts)}")
    assert counts.total() >= 10_000 / len(KINDS)
    assert_both(counts)
