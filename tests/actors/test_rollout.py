"""The rollout worker without Ray: calls from several threads share an engine and change nothing for each other."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.batcher import Batcher, RolloutStats
from actors.rollout import RolloutWorker
from actors.telemetry import sampling_metrics
from actors.weights import PolicyHolder, Tensors, Weights
from diffrl.config import ModelConfig, RLConfig
from diffrl.config_file import validate
from diffrl.models.base import PolicyModel
from diffrl.models.dream import DreamModel
from diffrl.models.folders import load_model, state_dict_for_export
from diffrl.models.loading import load_policy_tokenizer
from diffrl.models.tokens import end_ids
from diffrl.sampler import Canvas, Engine, SamplingParams
from diffrl.types import Problem
from tests.diffrl.test_sampler import tiny_dream

MASK = 7
PARAMS = SamplingParams(algorithm="entropy", steps=64, temperature=1.0, top_p=None, top_k=None)
PATIENCE_S = 60  # of a test, for what takes milliseconds


@pytest.fixture(scope="module")
def tiny() -> DreamModel:
    return tiny_dream(layers=3)


class Watched(Engine):
    """An engine that lets a test look on before each of its steps."""

    def __init__(self, *args: Any, before_step: Callable[["Watched"], None], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.before_step = before_step

    def step(self):
        self.before_step(self)
        return super().step()


def canvas(num_prompt: int, num_tokens: int, seed: int) -> Canvas:
    length = num_prompt + num_tokens
    return Canvas(ids_L=torch.arange(length) % 50, hidden_L=torch.arange(length) >= num_prompt, seed=seed)


def engine_of(model: PolicyModel, before_step: Callable[[Watched], None] = lambda engine: None) -> Watched:
    return Watched(model, PARAMS, max_tokens=1 << 20, before_step=before_step)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.001)


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.ids_L, y.ids_L)
        and torch.equal(x.step_map_L, y.step_map_L)
        and torch.equal(x.probability_L, y.probability_L)
        for x, y in zip(a, b, strict=True)
    )


def test_calls_share_passes_and_get_what_they_get_alone(tiny):
    calls = [[canvas(3 + i, 10 + 5 * i, seed=10 * i + j) for j in range(3)] for i in range(4)]
    alone, passes = [], 0
    for call in calls:
        batcher = Batcher()
        alone.append(batcher.fill("v0", lambda: engine_of(tiny), call))
        passes += batcher.stats.num_passes
    batcher = Batcher()

    def all_are_there(engine: Watched) -> None:
        if engine.num_passes == 0:
            wait_until(lambda: len(batcher._orders) + engine.num_added // 3 == len(calls))

    with ThreadPoolExecutor(len(calls)) as threads:
        together = list(
            threads.map(lambda call: batcher.fill("v0", lambda: engine_of(tiny, all_are_there), call), calls)
        )
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))
    assert batcher.stats.num_passes < 0.6 * passes
    assert 0 < batcher.stats.num_useful_tokens <= batcher.stats.num_tokens_passed and batcher.stats.busy_s > 0


def test_a_call_returns_as_soon_as_its_rows_are_full(tiny):
    batcher = Batcher()
    short: list[Any] = []

    def hold(engine: Watched) -> None:
        if engine.num_passes == 1:  # the long call is on its way: the short one may come
            threading.Thread(target=lambda: short.append(batcher.fill("v0", engine_of_none, [canvas(3, 4, 1)]))).start()
            wait_until(lambda: bool(batcher._orders))
        if engine.num_passes == 20:  # the long one has not ended
            wait_until(lambda: bool(short))

    def engine_of_none() -> Engine:
        raise AssertionError("there is an engine already")

    (long,) = batcher.fill("v0", lambda: engine_of(tiny, hold), [canvas(3, 40, 0)])
    assert len(short) == 1 and long.passes > 20


def test_other_keys_wait_until_the_engine_is_idle(tiny):
    batcher = Batcher()
    log: list[str] = []
    others: list[threading.Thread] = []

    def first(engine: Watched) -> None:
        log.append("a")
        if not others:
            for key in ("b", "a", "c"):
                others.append(threading.Thread(target=call, args=(key, lambda engine, key=key: log.append(key))))
                others[-1].start()
                wait_until(lambda: len(batcher._orders) == len(others))
        assert batcher.idle.locked()

    def call(key: str, before_step: Callable[[Watched], None]) -> None:
        batcher.fill(key, lambda: engine_of(tiny, before_step), [canvas(3, 12, 5)])

    call("a", first)
    for thread in others:
        thread.join(PATIENCE_S)
    assert log == sorted(log) and set(log) == {"a", "b", "c"}
    wait_until(lambda: not batcher.idle.locked())


def test_what_the_engine_raises_reaches_every_call_that_waits_for_it(tiny):
    batcher = Batcher()

    def fail(engine: Watched) -> None:
        wait_until(lambda: len(batcher._orders) + engine.num_added == 3)
        if engine.num_added == 3:
            raise MemoryError("no room")

    with ThreadPoolExecutor(3) as threads:
        calls = [
            threads.submit(batcher.fill, "v0", lambda: engine_of(tiny, fail), [canvas(3, 8, seed)]) for seed in range(3)
        ]
        for call in calls:
            with pytest.raises(MemoryError, match="no room"):
                call.result(PATIENCE_S)
    with pytest.raises(ZeroDivisionError):
        batcher.fill("v1", lambda: 1 // 0, [canvas(3, 8, 0)])  # pyright: ignore
    assert same(
        batcher.fill("v0", lambda: engine_of(tiny), [canvas(3, 8, 0)]),
        Batcher().fill("v0", lambda: engine_of(tiny), [canvas(3, 8, 0)]),
    )
    assert batcher.fill("v0", lambda: engine_of(tiny), []) == []


def test_sampling_metrics():
    before = [
        RolloutStats(num_passes=10, num_tokens_passed=100, num_useful_tokens=90, busy_s=1.0),
        RolloutStats(num_passes=50, num_tokens_passed=900, num_useful_tokens=900, busy_s=9.0),
    ]
    after = [
        RolloutStats(num_passes=30, num_tokens_passed=400, num_useful_tokens=290, busy_s=2.5),
        RolloutStats(num_passes=4, num_tokens_passed=100, num_useful_tokens=60, busy_s=0.5),  # a new one
    ]
    assert sampling_metrics(before, after, num_tokens=700) == {
        "rollout/forward_passes": 24,
        "rollout/tokens_per_second": 700.0,  # in one second of both
        "rollout/useful_share": 0.65,
    }
    assert set(sampling_metrics(after, after, 0).values()) == {0.0}


# The worker


class Published(PolicyHolder):
    """Holds a model that needs no object store, under any version."""

    def __init__(self, model: PolicyModel):
        super().__init__("cpu")
        self.model = model

    def at(self, weights: Weights) -> PolicyModel:
        self.version = weights.version
        return self.model


WEIGHTS = Weights(
    version=3, hf_config={}, num_tokens=None, tensors=Tensors(entries=(), hashes=(), buckets=()), adapter=None
)


@pytest.fixture(scope="module")
def worker(tuned_model: Path) -> RolloutWorker:
    tokenizer = load_policy_tokenizer(ModelConfig(path=str(tuned_model)))
    worker = RolloutWorker(tokenizer, completion_tokens=40, max_tokens=1024, threads=1)
    worker.holder = Published(load_model(tuned_model).eval())
    return worker


def test_a_group_depends_on_its_own_call_alone(worker: RolloutWorker, problems: list[Problem]):
    params = replace(PARAMS, steps=10)
    calls = [(problem, ordinal, (ordinal, 77, 78), params, WEIGHTS) for ordinal, problem in enumerate(problems)]
    alone = [worker.generate(*call) for call in calls]
    before = worker.stats()
    with ThreadPoolExecutor(len(calls)) as threads:
        together = list(threads.map(lambda call: worker.generate(*call), calls))
    assert worker.stats().num_passes > before.num_passes
    for a, b in zip(alone, together, strict=True):
        assert (a.problem, a.ordinal, a.policy_version, a.twins) == (b.problem, b.ordinal, 3, ())
        assert [r.text for r in a.rollouts] == [r.text for r in b.rollouts]
        for x, y in zip(a.rollouts, b.rollouts, strict=True):
            assert (x.sample_index, x.seed, x.num_tokens) == (y.sample_index, y.seed, y.num_tokens)
            for name in ("completion_ids_C", "step_map_C", "probability_C"):
                first, second = getattr(x, name), getattr(y, name)
                assert first.dtype == second.dtype and first.tobytes() == second.tobytes(), name
            assert y.probability_C.dtype == "float16" and 0 < y.probability_C.min() <= y.probability_C.max() <= 1
            assert sorted(set(y.step_map_C.tolist())) == list(range(10))
    assert any("def" in r.text for group in together for r in group.rollouts)


def test_twins_are_what_exact_sampling_gives(worker: RolloutWorker, problems: list[Problem]):
    exact = replace(PARAMS, steps=40, temperature=0.0)
    fast = replace(exact, tokens_per_step=20)
    guarded = worker.generate(problems[0], 0, (1, 2, 3), fast, WEIGHTS, (0, 2))
    plain = worker.generate(problems[0], 0, (1, 2, 3), exact, WEIGHTS)
    assert [(t.sample_index, t.seed) for t in guarded.twins] == [(0, 1), (2, 3)]
    for twin in guarded.twins:
        expected = plain.rollouts[twin.sample_index]
        assert twin.text == expected.text and (twin.step_map_C == expected.step_map_C).all()
        assert guarded.rollouts[twin.sample_index].step_map_C.max() == 1 < twin.step_map_C.max()
    assert guarded.judged == guarded.rollouts + guarded.twins


def test_pull_waits_for_the_engine(worker: RolloutWorker):
    pulled = threading.Thread(target=worker.pull, args=(replace(WEIGHTS, version=9),))
    with worker.batcher.idle:
        pulled.start()
        time.sleep(0.05)
        assert pulled.is_alive() and worker.holder.version != 9
    pulled.join(PATIENCE_S)
    assert worker.holder.version == 9


def test_early_end_knows_the_end_tokens(worker: RolloutWorker, problems: list[Problem]):
    params = replace(PARAMS, steps=40, temperature=0.0, early_end=True)
    (rollout,) = worker.generate(problems[0], 0, (1,), params, WEIGHTS).rollouts
    assert rollout.num_tokens < 40 and rollout.completion_ids_C[-1] in end_ids(worker.tokenizer)
    assert not torch.from_numpy(rollout.probability_C[: rollout.num_tokens]).isnan().any()


def test_the_dtype_of_rollouts_may_differ_from_the_published_one(tiny: DreamModel):
    state = state_dict_for_export(tiny)
    weights = replace(WEIGHTS, hf_config=tiny.hf_config)
    for dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        model = PolicyHolder("cpu", dtype).build(weights, state)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}
        assert model.backbone.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, about itself
def test_compiled_layers_compute_the_same(tiny: DreamModel):
    """Batches of changing shapes, and a second version, whose layers are not compiled again."""
    state, weights = state_dict_for_export(tiny), replace(WEIGHTS, hf_config=tiny.hf_config)
    eager, holder = PolicyHolder("cpu").build(weights, state), PolicyHolder("cpu", compile=True)
    for _version in range(2):
        compiled = holder.build(weights, state)
        for rows, width in ((3, 32), (5, 48), (2, 16)):
            generator = torch.Generator().manual_seed(width)
            ids = torch.randint(50, (rows, width), generator=generator)
            mask = torch.arange(width) >= torch.arange(rows)[:, None]
            select = mask & (torch.rand(rows, width, generator=generator) < 0.4)
            with torch.no_grad():
                expected, got = (model.selected_states(ids, mask, select, packed=False) for model in (eager, compiled))
            assert (expected - got).abs().max() < 1e-5 * expected.abs().max()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] in (1, 2)


# What fits


def test_a_batch_holds_at_least_a_group():
    def config(max_tokens: int) -> RLConfig:
        raw = {
            "stage": "rl",
            "data": {"source": "microcode", "max_prompt_tokens": 40},
            "sampling": {"completion_tokens": 30, "steps": 10},
            "method": {"group_size": 4},
            "rollout": {"max_tokens_per_batch": max_tokens},
        }
        config = validate(raw, "here")
        assert isinstance(config, RLConfig)
        return config

    assert config(1).tokens_per_group == 4 * 80  # 70, aligned
    for max_tokens, expected, in_flight in ((1, 320, 2), (639, 639, 2), (640, 640, 3), (16_384, 16_384, 52)):
        assert (config(max_tokens).max_tokens_per_batch, config(max_tokens).groups_in_flight) == (expected, in_flight)
