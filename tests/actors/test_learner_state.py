"""The learner group's state: saved and loaded, rebuilt after a death, kept clean of NaN. bf16 weights over fp32 ones."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from actors.engine import read_note
from actors.learner import Learner
from actors.pool import WorkersKeepDyingError
from actors.weights import PackedState, fetch
from diffrl.checkpoint import NOTE
from diffrl.config import RLConfig
from diffrl.errors import RunStoppedError
from diffrl.models.folders import load_model, state_dict_for_export
from diffrl.models.loading import load_policy, load_policy_tokenizer
from diffrl.saved_batch import load_batch
from diffrl.types import TrainBatch, UpdateResult
from tests.actors.learner_case import STEPS, ZERO_3, config_of, end, plain_updates, random_batch, running

Tensors = dict[str, torch.Tensor]


def trained(
    config: RLConfig, batches: list[TrainBatch], disturb: Any = None, save_every: int | None = None
) -> tuple[list[UpdateResult], Tensors, Learner]:
    """Updates on the batches and the weights after them; `disturb(group, number)` is called before each, and the group is
    saved after every `save_every` of them."""
    with running(config, load_policy_tokenizer(config.model)) as group:
        results = []
        for number, batch in enumerate(batches):
            if disturb is not None:
                disturb(group, number)
            results.append(group.update(ray.put(batch)))
            if save_every and (number + 1) % save_every == 0:
                group.save(Path(config.run_dir) / f"after-{number + 1}")
        if disturb is not None:
            disturb(group, len(batches))
        return results, dict(fetch(group.publish())), group


def batches_for(config: RLConfig, count: int) -> list[TrainBatch]:
    exact = config.model.model_copy(update={"dtype": "float32"})
    model = load_policy(exact, load_policy_tokenizer(exact), seed=0)
    return [random_batch(config, model, seed) for seed in range(count)]


def assert_same(left: Tensors, right: Tensors) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def spoiled(batch: TrainBatch, advantage: float) -> TrainBatch:
    """The same batch with one impossible advantage."""
    advantages = batch.advantages_B.clone()
    row = int(batch.loss_mask_BC.sum(1).argmax())
    advantages[row] = advantage
    return replace(batch, advantages_B=advantages)


BF16_CASES = {
    "two ranks, ZeRO 2": {"num_ranks": 2, "zero_stage": 2, "max_tokens_per_micro_batch": 1},
    "one rank, ZeRO 1": {"zero_stage": 1},
    "two ranks, ZeRO 1": {"num_ranks": 2, "zero_stage": 1, "max_tokens_per_micro_batch": 1},
    "two ranks, ZeRO 3": {"num_ranks": 2, "max_tokens_per_micro_batch": 1, **ZERO_3},
    "offload, ZeRO 2": {"num_ranks": 2, "zero_stage": 2, "offload": "optimizer", "max_tokens_per_micro_batch": 1},
    "offload, ZeRO 3": {"num_ranks": 2, "offload": "all", "max_tokens_per_micro_batch": 1, **ZERO_3},
}


@pytest.mark.parametrize(
    "learner",
    [
        pytest.param(case, id=name, marks=[] if index == 0 else pytest.mark.slow)
        for index, (name, case) in enumerate(BF16_CASES.items())
    ],
)
def test_bf16_weights_follow_fp32_ones(ray_cluster, tuned_model: Path, tmp_path: Path, learner: dict):
    """A step of the optimizer is less than half the last digit of a bf16 weight near 1, so such a weight alone would
    never move; the sum of steps in fp32 moves it."""
    # The last digit of 1 is 2^-7 = 7.8e-3. Eight steps of 7e-4 add up to 5.6e-3: more than half of it.
    # One iteration: in a second one the clip would decide by the last digits of ratios which tokens count.
    config = config_of(tuned_model, tmp_path, learner=learner, method={"kl_coef": 0.0, "num_iterations": 1})
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"dtype": "bfloat16"}),
            "optim": config.optim.model_copy(update={"lr": 7e-4, "min_lr_ratio": 1.0, "warmup_steps": 0}),
        }
    )
    batch = batches_for(config, 1)[0]
    results, weights, _ = trained(config, [batch] * 8)
    model = load_policy(config.model, load_policy_tokenizer(config.model), seed=0)
    before = state_dict_for_export(model)
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    norms = [name for name in before if name.endswith("layernorm.weight")]
    moved = sum(int((weights[name] != before[name]).sum()) for name in norms)
    assert moved > 0.05 * sum(before[name].numel() for name in norms)
    exact = load_policy(config.model, load_policy_tokenizer(config.model), seed=0).float()
    expected = plain_updates(config, exact, [batch] * 8)
    # Later gradients are those of policies that rounding has driven apart.
    assert results[0].metrics["optim/grad_norm"] == pytest.approx(expected[0]["optim/grad_norm"], rel=0.1)
    change = {name: tensor - before[name].float() for name, tensor in state_dict_for_export(exact).items()}
    got = torch.cat([(weights[name].float() - before[name].float()).flatten() for name in change])
    wanted = torch.cat([tensor.flatten() for tensor in change.values()])
    assert torch.nn.functional.cosine_similarity(got, wanted, dim=0) > 0.9
    assert got.norm() == pytest.approx(wanted.norm().item(), rel=0.1)


STATE_CASES = {
    "two ranks, ZeRO 1": {"num_ranks": 2, "zero_stage": 1},
    "one rank": {},
    "two ranks, ZeRO 2": {"num_ranks": 2, "zero_stage": 2},
    "two ranks, ZeRO 3": {"num_ranks": 2, **ZERO_3},
}


@pytest.mark.parametrize(
    "learner",
    [
        pytest.param(case, id=name, marks=[] if index == 0 else pytest.mark.slow)
        for index, (name, case) in enumerate(STATE_CASES.items())
    ],
)
@pytest.mark.parametrize(
    ("save_every", "deaths"),
    [
        pytest.param(1, (1,), id="inside an update"),
        pytest.param(1, (0, 1, 2), id="three times", marks=pytest.mark.slow),
        pytest.param(2, (0, 1, 2), id="three times, saved every other update", marks=pytest.mark.slow),
    ],
)
def test_a_lost_rank_changes_nothing(ray_cluster, tuned_model, tmp_path, learner: dict, save_every: int, deaths):
    """One dies before the first update (0), one inside the second (1), one before the weights are published (2)."""

    def die_at_the_second_optimizer_step(rank) -> None:
        step = rank.engine.step
        rank.engine.step = lambda lr: os._exit(1) if rank.num_updates % 2 else step(lr)

    def disturb(group: Learner, number: int) -> None:
        victim: Any = group.ranks[-1]
        if number == 1:
            ray.get(victim.__ray_call__.remote(die_at_the_second_optimizer_step))
        elif number in deaths:
            end(victim)

    config = config_of(tuned_model, tmp_path / "lost", learner=learner)
    batches = batches_for(config, STEPS)
    lost = trained(config, batches, disturb, save_every)
    calm = trained(config_of(tuned_model, tmp_path / "calm", learner=learner), batches)
    assert lost[2].num_rebuilds == len(deaths) and calm[2].num_rebuilds == 0
    assert lost[0] == calm[0]
    assert_same(lost[1], calm[1])
    assert lost[2].saved == tmp_path / "lost" / "after-2" and not lost[2].since_save


@pytest.mark.slow
def test_a_frozen_rank_is_a_lost_one(ray_cluster, tuned_model, tmp_path):
    def freeze(group: Learner, number: int) -> None:
        if number == 1:
            victim: Any = group.ranks[-1]
            os.kill(ray.get(victim.__ray_call__.remote(lambda rank: os.getpid())), signal.SIGSTOP)

    learner = STATE_CASES["two ranks, ZeRO 1"]
    config = config_of(tuned_model, tmp_path / "frozen", learner=learner, supervision={"update_s": 30.0})
    batches = batches_for(config, STEPS)
    frozen = trained(config, batches, freeze, save_every=1)
    calm = trained(config_of(tuned_model, tmp_path / "calm", learner=learner), batches)
    assert frozen[2].num_rebuilds == 1
    assert frozen[0] == calm[0]
    assert_same(frozen[1], calm[1])


@pytest.mark.slow
def test_ranks_that_keep_dying_end_the_run(ray_cluster, tuned_model, tmp_path):
    config = config_of(tuned_model, tmp_path)
    batch = batches_for(config, 1)[0]
    with running(config, load_policy_tokenizer(config.model)) as group:
        make_rank = group.make_rank

        def make_mortal(number: int):
            rank = make_rank(number)
            end(rank)
            return rank

        group.make_rank = make_mortal
        end(group.ranks[0])
        with pytest.raises(WorkersKeepDyingError, match="ranks of the learner keep dying"):
            group.update(ray.put(batch))


@pytest.mark.parametrize(
    "learner",
    [
        pytest.param(case, id=name, marks=[] if name == "two ranks, ZeRO 3" else pytest.mark.slow)
        for name, case in STATE_CASES.items()
    ],
)
def test_a_saved_state_goes_on(ray_cluster, tuned_model, tmp_path, learner: dict):
    config = config_of(tuned_model, tmp_path / "first", learner=learner)
    batches = batches_for(config, STEPS)
    tokenizer = load_policy_tokenizer(config.model)
    with running(config, tokenizer) as group:
        group.update(ray.put(batches[0]))
        kept = tmp_path / "after-1"
        group.save(kept)
        last = group.update(ray.put(batches[1]))
        expected = dict(fetch(group.publish()))
    with running(config_of(tuned_model, tmp_path / "second", learner=learner), tokenizer) as group:
        assert group.load(kept) == 1
        assert group.update(ray.put(batches[1])) == last
        assert_same(dict(fetch(group.publish())), expected)


def test_another_layout_is_refused_in_one_line(tmp_path):
    layout = {"learner.num_ranks": 1, "learner.zero_stage": 0, "model.dtype": "float32"}
    with pytest.raises(RunStoppedError, match=f"no complete save; name a folder with a {NOTE}"):
        read_note(tmp_path, layout)
    (tmp_path / NOTE).write_text(json.dumps({**layout, "version": 7}))
    assert read_note(tmp_path, layout) == {"version": 7}
    for field, value in (("learner.num_ranks", 2), ("learner.zero_stage", 3), ("model.dtype", "bfloat16")):
        was = layout[field]
        with pytest.raises(RunStoppedError, match=f"^{field}: {value!r} must be {was!r}, with which .* was saved; to"):
            read_note(tmp_path, {**layout, field: value})


BAD_CASES = {
    "two ranks, ZeRO 2": {"num_ranks": 2, "zero_stage": 2},
    "one rank": {},
    "two ranks": {"num_ranks": 2},
    "two ranks, ZeRO 1": {"num_ranks": 2, "zero_stage": 1},
    "two ranks, ZeRO 3": {"num_ranks": 2, "max_tokens_per_micro_batch": 1, **ZERO_3},
    "offload, ZeRO 2": {"num_ranks": 2, "zero_stage": 2, "offload": "optimizer", "max_tokens_per_micro_batch": 1},
    "offload, ZeRO 3": {"num_ranks": 2, "offload": "all", "max_tokens_per_micro_batch": 1, **ZERO_3},
}


@pytest.mark.parametrize(
    "learner",
    [
        pytest.param(case, id=name, marks=[] if index == 0 else pytest.mark.slow)
        for index, (name, case) in enumerate(BAD_CASES.items())
    ],
)
def test_steps_that_are_not_finite_change_nothing(ray_cluster, tuned_model, tmp_path, learner: dict):
    """A batch with an infinite advantage on one rank, between two sound ones: as if it had not been there, but for the
    place in the schedule."""
    config = config_of(tuned_model, tmp_path, learner=learner)
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"min_lr_ratio": 1.0})})
    first, second = batches_for(config, 2)
    bad = spoiled(second, float("inf"))
    results, weights, _ = trained(config, [first, bad, second])
    assert [r.metrics["optim/bad_steps"] for r in results] == [0, 2, 0]
    assert [r.metrics["optim/bad_in_a_row"] for r in results] == [0, 2, 0]
    assert [r.version for r in results] == [1, 2, 3]
    assert all(torch.isfinite(torch.tensor(value)) for r in results for value in r.metrics.values())
    model = load_policy(config.model, load_policy_tokenizer(config.model), seed=0)
    expected = plain_updates(config, model, [first, second])
    for result, row in zip([results[0], results[2]], expected, strict=True):
        for key, value in row.items():
            assert result.metrics[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    for name, tensor in state_dict_for_export(model).items():
        assert (weights[name] - tensor).abs().max() < 5e-4, name
    files = sorted(path.name for path in (tmp_path / "failed_batches").iterdir())
    assert files == ["version-000001.json", "version-000001.safetensors"]
    kept = load_batch(tmp_path / "failed_batches" / "version-000001")
    assert torch.equal(kept.advantages_B, bad.advantages_B) and kept.num_loss_tokens == bad.num_loss_tokens


def test_an_infinite_weight_is_noticed(ray_cluster, tuned_model, tmp_path):
    """A NaN from inside the model, in the second inner iteration only: the first has been applied."""
    config = config_of(tuned_model, tmp_path)
    batch = batches_for(config, 1)[0]

    def spoil(group: Learner, number: int) -> None:
        def infinite_after_one_step(rank) -> None:
            step = rank.engine.step

            def stepping(lr: float) -> float | None:
                norm = step(lr)
                with torch.no_grad():
                    rank.model.backbone.model.norm.weight[0] = torch.inf
                return norm

            rank.engine.step = stepping

        if number == 0:
            ray.get(group.ranks[0].__ray_call__.remote(infinite_after_one_step))

    results, _, _ = trained(config, [batch], spoil)
    assert results[0].metrics["optim/bad_steps"] == 1 and results[0].metrics["optim/bad_in_a_row"] == 1
    assert results[0].metrics["optim/grad_norm"] > 0


def test_stage_3_holds_parts_and_publishes_them_bucket_by_bucket(ray_cluster, tuned_model, tmp_path):
    config = config_of(tuned_model, tmp_path, learner={"num_ranks": 2, **ZERO_3})
    batch = batches_for(config, 1)[0]

    def whole_elements(rank) -> int:
        return sum(p.numel() for p in rank.model.parameters())

    def export(rank) -> list[tuple[int, int, Tensors]]:
        """Of each bucket: bytes, elements that are whole when it is handed out, tensors."""
        buckets = rank.engine.export("policy", write=rank.rank == 1, bucket_bytes=60_000)
        return [
            (len(bucket), whole_elements(rank), dict(PackedState([replace(e, bucket=0) for e in entries], [bucket])))
            for entries, bucket in buckets
        ]

    with running(config, load_policy_tokenizer(config.model)) as group:
        group.update(ray.put(batch))
        ranks: list[Any] = group.ranks
        assert ray.get([rank.__ray_call__.remote(whole_elements) for rank in ranks]) == [0, 0]
        nothing, buckets = ray.get([rank.__ray_call__.remote(export) for rank in ranks])
        expected = dict(fetch(group.publish()))
    largest = max(tensor.nbytes for tensor in expected.values())
    assert nothing == []  # the rank that does not write takes part in the gathering and keeps nothing
    assert len(buckets) > 5 and all(size <= max(60_000, largest) for size, _, _ in buckets)
    assert [whole for _, whole, _ in buckets] == [0] * len(buckets)
    assert_same({name: t for _, _, tensors in buckets for name, t in tensors.items()}, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("recompute", "calls"), [(False, 3), (True, 5)])
def test_recompute_runs_layers_again(ray_cluster, tuned_model, tmp_path, recompute: bool, calls: int):
    """Per micro-batch: one pass for old scores, two with gradient, and each of these once more in its backward pass."""
    config = config_of(tuned_model, tmp_path, learner={"recompute": recompute})
    batch = batches_for(config, 1)[0]

    def count(rank) -> None:
        rank.calls = 0

        def counted(module, args) -> None:
            rank.calls += 1

        rank.model.backbone.model.layers[0].self_attn.register_forward_pre_hook(counted)

    with running(config, load_policy_tokenizer(config.model)) as group:
        rank: Any = group.ranks[0]
        ray.get(rank.__ray_call__.remote(count))
        group.update(ray.put(batch))
        assert ray.get(rank.__ray_call__.remote(lambda rank: rank.calls)) == calls


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["merged", "adapter"])
@pytest.mark.parametrize(
    "learner", [{"num_ranks": 2, "zero_stage": 2}, {"num_ranks": 2, **ZERO_3}], ids=["ZeRO 2", "ZeRO 3"]
)
def test_adapters_are_trained_and_published_from_any_stage(
    ray_cluster, tuned_model, tmp_path, learner: dict, mode: str
):
    """As one rank does it, through a death: the base is published once."""
    model = {"lora": {"rank": 4, "alpha": 16.0, "publish": mode}}

    def run(folder: str, learner: dict, disturb: Any) -> Tensors:
        config = config_of(tuned_model, tmp_path / folder, learner=learner, model=model)
        with running(config, load_policy_tokenizer(config.model)) as group:
            versions = [group.publish()]
            for number, batch in enumerate(batches_for(config, STEPS)):
                disturb(group, number)
                group.update(ray.put(batch))
                versions.append(group.publish())
            assert len({weights.tensors for weights in versions}) == (1 if mode == "adapter" else STEPS + 1)
            return dict(fetch(versions[-1]))

    one = run("one", {}, lambda group, number: None)
    many = run("many", learner, lambda group, number: end(group.ranks[1]) if number == 1 else None)
    assert one.keys() == many.keys()
    before = state_dict_for_export(load_model(tuned_model))
    assert sum((one[name] - before[name]).abs().max() > 1e-4 for name in one) == 2 * 7  # layers x linear layers
    for name, tensor in one.items():
        gap = (many[name] - tensor).abs()
        assert gap.max() < 5e-4 and gap.mean() < 2e-5, name
