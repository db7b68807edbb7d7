"""The sampler's contract, in full: whole distributions by enumeration, rows that do not depend on their company, bounded memory.

Shapes: B rows, L positions, V vocabulary, n hidden positions.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any
from weakref import finalize

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from diffrl.models.dream import DreamModel
from diffrl.models.folders import load_model
from diffrl.sampler import Canvas, Engine, Filled, SamplingParams, engine, sample
from tests.benchmarks.sampler import peer_generate
from tests.diffrl.test_sampler import tiny_dream
from tests.golden_files import golden_file, golden_json
from tests.test_golden_generate import params_of

ALGORITHMS = ("origin", "maskgit_plus", "topk_margin", "entropy")


def params(**changes) -> SamplingParams:
    return SamplingParams(**{"steps": 4, "temperature": 1.0, "top_p": None, "top_k": None, **changes})


# Whole distributions. 4 positions, 3 tokens and [MASK]: every way a completion can come about is followed.

NUM, MASK = 4, 3
Outcome = tuple[tuple[int, ...], tuple[int, ...]]  # completion, step map


class StateTable:
    """A model whose logits at a position depend on every token of the row: on the prompt's last and all of the completion."""

    mask_token_id, vocab_size = MASK, MASK + 1

    def __init__(self, seed: int, scale: float = 1.3):
        generator = torch.Generator().manual_seed(seed)
        self.table = scale * torch.randn((MASK + 1) ** (1 + NUM), NUM, MASK + 1, generator=generator)

    def at(self, row: Sequence[int]) -> Tensor:
        """[NUM, V] of the prompt's last token and the completion."""
        return self.table[sum(token * (MASK + 1) ** place for place, token in enumerate(row))]

    def selected_states(self, ids_BL: Tensor, attention_mask_BL: Tensor, select_BL: Tensor, *, packed: bool) -> Tensor:
        assert not select_BL[:, :-NUM].any()
        number_B = (ids_BL[:, -1 - NUM :] * (MASK + 1) ** torch.arange(1 + NUM)).sum(1)
        return self.table[number_B][select_BL[:, -NUM:]]

    def logits(self, states_XD: Tensor) -> Tensor:
        return states_XD


class Reference:
    """The distribution of outcomes by the reference algorithm, written out; float64."""

    def __init__(self, model: StateTable, params: SamplingParams):
        self.model, self.params = model, params
        steps = torch.linspace(1, params.eps, params.steps + 1)
        self.share = [1.0 if i == params.steps - 1 else float(1 - steps[i + 1] / steps[i]) for i in range(params.steps)]

    def distribution(self, prompt: int) -> dict[Outcome, float]:
        total: dict[Outcome, float] = defaultdict(float)

        def follow(tokens: tuple[int, ...], made: tuple[int, ...], step: int, weight: float) -> None:
            if MASK not in tokens:
                total[tokens, made] += weight
                return
            for revealed, chance in self.reveals(prompt, tokens, step):
                now = tuple(revealed.get(place, token) for place, token in enumerate(tokens))
                when = tuple(step if place in revealed else old for place, old in enumerate(made))
                follow(now, when, step + 1, weight * chance)

        follow((MASK,) * NUM, (-1,) * NUM, 0, 1.0)
        assert abs(sum(total.values()) - 1) < 1e-9
        return dict(total)

    @cache  # noqa: B019  (as long-lived as the test)
    def reveals(self, prompt: int, tokens: tuple[int, ...], step: int) -> list[tuple[dict[int, int], float]]:
        """All that a step can do: {position: token} and its probability."""
        hidden = [place for place in range(NUM) if tokens[place] == MASK]
        logits = {place: self.model.at((prompt, *tokens))[place].double() for place in hidden}
        chance_of: dict[tuple[tuple[int, int], ...], float] = defaultdict(float)
        for revealed, chance in self.ways(logits, self.share[step]):
            chance_of[tuple(sorted(revealed.items()))] += chance
        return [(dict(revealed), chance) for revealed, chance in chance_of.items() if chance > 0]

    def ways(self, logits: dict[int, Tensor], share: float) -> Iterator[tuple[dict[int, int], float]]:
        """The same, one by one; a result may come about in several ways."""
        hidden = list(logits)
        probs = {place: self.filtered(logits_V) for place, logits_V in logits.items()}
        if self.params.algorithm == "origin":
            for size in range(len(hidden) + 1):
                for places in itertools.combinations(hidden, size):
                    chance = share**size * (1 - share) ** (len(hidden) - size)
                    yield from ((drawn, chance * p) for drawn, p in self.draws(places, logits))
            return
        count = int(torch.tensor(float(len(hidden))) * torch.tensor(share))  # float32, rounded down
        if self.params.algorithm == "maskgit_plus":
            for drawn, p in self.draws(hidden, logits):
                confidence = {place: float(probs[place][token]) for place, token in drawn.items()}
                yield from (({i: drawn[i] for i in places}, p * q) for places, q in self.choices(confidence, count))
            return
        if self.params.algorithm == "topk_margin":
            top = {place: probs[place].sort(descending=True).values for place in hidden}
            confidence = {place: float(top[place][0] - top[place][1]) for place in hidden}
        else:
            confidence = {place: float((probs[place] * (probs[place] + 1e-10).log()).sum()) for place in hidden}
        for places, q in self.choices(confidence, count):
            yield from ((drawn, p * q) for drawn, p in self.draws(places, logits))

    def filtered(self, logits_V: Tensor) -> Tensor:
        """Temperature, top_p by a full sort, top_k; [MASK] still among them."""
        logits_V = logits_V / (self.params.temperature or 1.0)
        if self.params.top_p is not None:
            sorted_V, order_V = logits_V.sort(descending=True)
            before_V = sorted_V.softmax(-1).cumsum(-1) - sorted_V.softmax(-1)
            assert ((before_V[1:] - self.params.top_p).abs() > 1e-5).all(), "at the edge of the nucleus: another seed"
            drop_V = before_V > self.params.top_p
            drop_V[0] = False
            logits_V = logits_V.masked_fill(torch.zeros(MASK + 1).bool().scatter(0, order_V, drop_V), -torch.inf)
        if self.params.top_k is not None:
            logits_V = logits_V.masked_fill(logits_V < logits_V.topk(self.params.top_k).values[-1], -torch.inf)
        return logits_V.softmax(-1)

    def draws(self, places: Sequence[int], logits: dict[int, Tensor]) -> Iterator[tuple[dict[int, int], float]]:
        """Independent draws at `places`, [MASK] left out; the likeliest token where nothing else is left."""
        allowed = []
        for place in places:
            p_V = self.filtered(logits[place])[:MASK]
            if self.params.temperature == 0 or not p_V.any():
                p_V = torch.nn.functional.one_hot(logits[place][:MASK].argmax(), MASK).double()
            allowed.append([(place, token, p) for token, p in enumerate((p_V / p_V.sum()).tolist()) if p > 0])
        for combination in itertools.product(*allowed):
            chance = 1.0
            for _, _, p in combination:
                chance *= p
            yield {place: token for place, token, _ in combination}, chance

    def choices(self, confidence: dict[int, float], count: int) -> Iterator[tuple[tuple[int, ...], float]]:
        """The positions to reveal: the most confident, or drawn one after the other without putting back."""
        if not self.params.alg_temp or count in (0, len(confidence)):
            ranked = sorted(confidence, key=lambda place: -confidence[place])
            if 0 < count < len(ranked):
                gap = confidence[ranked[count - 1]] - confidence[ranked[count]]
                assert gap > 1e-6, "a tie between positions: another seed"
            yield tuple(ranked[:count]), 1.0
            return
        weight = {place: torch.tensor(c / self.params.alg_temp).exp().item() for place, c in confidence.items()}
        for order in itertools.permutations(confidence, count):
            left, chance = sum(weight.values()), 1.0
            for place in order:
                chance *= weight[place] / left
                left -= weight[place]
            yield order, chance


def deviation(drawn: Counter[Any], exact: Mapping[Any, float]) -> float:
    """Standard deviations by which chi-square exceeds its mean; outcomes expected fewer than 5 times are one."""
    num = sum(drawn.values())
    impossible = [outcome for outcome in drawn if outcome not in exact]
    if impossible:
        return float("inf")
    often = {outcome: p for outcome, p in exact.items() if p * num >= 5}
    pairs = [(drawn[outcome], p * num) for outcome, p in often.items()]
    rest = (num - sum(seen for seen, _ in pairs), num - sum(expected for _, expected in pairs))
    pairs += [rest] if rest[1] >= 1 else []
    freedom = max(1, len(pairs) - 1)
    return (sum((seen - expected) ** 2 / expected for seen, expected in pairs) - freedom) / (2 * freedom) ** 0.5


SETTINGS: dict[str, dict[str, Any]] = {
    "three steps": {"steps": 3},
    "two steps, filtered": {"steps": 2, "temperature": 0.8, "top_p": 0.93, "top_k": 3},
    "drawn positions": {"steps": 3, "temperature": 1.2, "top_k": 3, "alg_temp": 0.3},
}
ROWS = 16_000


def drawn_outcomes(model: StateTable, sampling: SamplingParams) -> tuple[Counter[Outcome], Counter[Outcome]]:
    """Of two prompts of different lengths, whose rows stand in one batch in turn."""
    prompt = torch.tensor([[0, 3, 1], [0, 0, 2]]).repeat(ROWS // 2, 1)
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]]).repeat(ROWS // 2, 1)
    result = sample(model, prompt, mask, num_tokens=NUM, params=sampling, seeds=range(ROWS))
    outcomes = [
        (tuple(ids), tuple(steps))
        for ids, steps in zip(result.completion_ids_BC.tolist(), result.step_map_BC.tolist(), strict=True)
    ]
    return Counter(outcomes[::2]), Counter(outcomes[1::2])


@pytest.mark.parametrize(
    ("algorithm", "setting"),
    [
        # What is filtered, and drawn positions, hold all that three plain steps do.
        pytest.param(algorithm, setting, marks=pytest.mark.slow if setting == "three steps" else [])
        for algorithm, setting in itertools.product(ALGORITHMS, SETTINGS)
        if algorithm != "origin" or "alg_temp" not in SETTINGS[setting]  # which plays no part in it
    ],
)
def test_outcomes_have_the_reference_distribution(algorithm, setting):
    model, sampling = StateTable(seed=6), params(algorithm=algorithm, **SETTINGS[setting])
    apart = dict.fromkeys(set(ALGORITHMS) - {algorithm}, 0.0)
    for prompt, drawn in zip((1, 2), drawn_outcomes(model, sampling), strict=True):
        exact = Reference(model, sampling).distribution(prompt)
        assert deviation(drawn, exact) < 4
        assert deviation(completions(drawn), completions(exact)) < 4
        for other in apart:
            wrong = Reference(model, replace(sampling, algorithm=other)).distribution(prompt)
            apart[other] = max(apart[other], deviation(drawn, wrong))
    assert min(apart.values()) > 20, apart  # that the test can tell them apart


def completions(outcomes: Mapping[Outcome, float]) -> Counter[tuple[int, ...]]:
    total: Counter[Any] = Counter()
    for (tokens, _), amount in outcomes.items():
        total[tokens] += amount  # pyright: ignore[reportArgumentType]
    return total


# Rows and their company.


@pytest.fixture(scope="module")
def model() -> DreamModel:
    return tiny_dream()


def canvas(generator: torch.Generator, prompt: int, num: int, **more: Any) -> Canvas:
    """A random prompt and `num` positions to fill behind it."""
    ids_L = torch.randint(8, 50, (prompt + num,), generator=generator)
    seed = int(torch.randint(1 << 62, (), generator=generator))
    return Canvas(ids_L=ids_L, hidden_L=torch.arange(prompt + num) >= prompt, seed=seed, **more)


def fill(model: Any, canvases: Sequence[Canvas], sampling: SamplingParams, max_tokens: int = 1 << 30) -> list[Filled]:
    engine = Engine(model, sampling, max_tokens=max_tokens)
    for row in canvases:
        engine.add(row)
    return engine.run()


def assert_same(got: Filled, wanted: Filled) -> None:
    """To the last bit."""
    assert torch.equal(got.ids_L, wanted.ids_L)
    assert torch.equal(got.step_map_L, wanted.step_map_L)
    assert torch.equal(got.probability_L, wanted.probability_L)


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_row_is_the_same_in_any_company(model, algorithm, temperature):
    sampling = params(algorithm=algorithm, temperature=temperature, top_p=0.95, top_k=20, steps=6)
    generator = torch.Generator().manual_seed(1)
    rows = [canvas(generator, 1 + 2 * i, 9) for i in range(16)]  # 10 to 40 positions: 16 and 32 among them
    strangers = [canvas(generator, 4 * i, 5 + 3 * i) for i in range(1, 14)]
    alone = [fill(model, [row], sampling)[0] for row in rows]
    assert {len(row.ids_L) for row in rows} >= {10, 16, 32, 40}
    order = torch.randperm(16, generator=generator).tolist()
    for members in (range(2), range(5, 12), range(16), order):
        for max_tokens in (1 << 30, 3 * 48, 1):
            for got, number in zip(fill(model, [rows[i] for i in members], sampling, max_tokens), members, strict=True):
                assert_same(got, alone[number])
    mixed = [row for pair in itertools.zip_longest(strangers, rows) for row in pair if row is not None]
    where = {id(row): i for i, row in enumerate(rows)}
    for max_tokens in (1 << 30, 500):
        for got, row in zip(fill(model, mixed, sampling, max_tokens), mixed, strict=True):
            if id(row) in where:
                assert_same(got, alone[where[id(row)]])


@pytest.mark.parametrize("alg_temp", [0.0, 0.4])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_siblings_are_the_same_together_and_alone(model, algorithm, alg_temp):
    """Equal canvases, which may be one input at first."""
    sampling = params(algorithm=algorithm, alg_temp=alg_temp, top_k=20, steps=4)
    generator = torch.Generator().manual_seed(4)
    for num in (3, 9, 30):
        first = canvas(generator, 5, num)
        siblings = [replace(first, seed=seed) for seed in range(6)] + [canvas(generator, 2, 12, steps=9)]
        for got, row in zip(fill(model, siblings, sampling), siblings, strict=True):
            assert_same(got, fill(model, [row], sampling)[0])


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_padding_on_the_left_changes_no_bit(model, temperature):
    sampling = params(temperature=temperature, top_k=20, steps=6)
    prompt = torch.tensor([[12, 13, 14], [30, 31, 32]])
    short = sample(model, prompt, torch.ones(2, 3), num_tokens=8, params=sampling, seeds=[5, 6])
    for pads in (1, 5, 64):
        padded = torch.nn.functional.pad(prompt, (pads, 0), value=9)
        mask = (torch.arange(3 + pads) >= pads).expand(2, -1)
        long = sample(model, padded, mask, num_tokens=8, params=sampling, seeds=[5, 6])
        assert torch.equal(long.completion_ids_BC, short.completion_ids_BC)
        assert torch.equal(long.step_map_BC, short.step_map_BC)
        assert torch.equal(long.probability_BC, short.probability_BC)


@pytest.mark.parametrize("width", [48, 64, 96, 320])
def test_of_equal_confidences_the_first_goes_first(width):
    for num, count in itertools.product((5, 20, 40), (1, 2, 3)):
        select_RW = (torch.arange(width) >= width - num)[None]
        chosen_K = engine.highest(torch.ones(num), select_RW, torch.tensor([count])).nonzero()[:, 1]
        assert chosen_K.tolist() == list(range(width - num, width - num + count))


# Continuous batching.


class Watched:
    """A model that notes the shape of every pass and how much of it was no padding."""

    def __init__(self, model: DreamModel):
        self.model, self.passes = model, list[tuple[int, int, int]]()
        self.mask_token_id, self.vocab_size = model.mask_token_id, model.vocab_size
        self.logits = model.logits

    def selected_states(self, ids_BL: Tensor, attention_mask_BL: Tensor, select_BL: Tensor, *, packed: bool) -> Tensor:
        self.passes.append((len(ids_BL), ids_BL.shape[1], int(attention_mask_BL.sum())))
        return self.model.selected_states(ids_BL, attention_mask_BL, select_BL, packed=packed)


def test_rows_of_all_lengths_keep_the_batch_full(model):
    """A pass has room for as many rows as its width leaves of the budget: its slots. The tail counts too."""
    generator = torch.Generator().manual_seed(2)
    number = torch.rand(40, generator=generator)
    rows = []
    for share in number.tolist():
        num = round(16 * 10**share)
        prompt = int(torch.randint(10, 61, (), generator=generator))
        rows.append(canvas(generator, prompt, num, steps=num))
    budget = 8 * max(engine.aligned(len(row.ids_L)) for row in rows)
    watched = Watched(model)
    denoising = Engine(watched, params(top_k=20), max_tokens=budget)
    for row in rows:
        denoising.add(row)
    filled = denoising.run()
    assert all(batch * width <= budget for batch, width, _ in watched.passes)
    assert denoising.num_passes == len(watched.passes)
    assert denoising.num_tokens_passed == sum(batch * width for batch, width, _ in watched.passes)
    assert denoising.num_useful_tokens == sum(useful for *_, useful in watched.passes)
    at_work = sum(batch for batch, *_ in watched.passes) / sum(budget // width for _, width, _ in watched.passes)
    assert at_work >= 0.85
    assert denoising.num_useful_tokens / denoising.num_tokens_passed >= 0.7  # padding, which CPUs do not compute
    for got, row in zip(filled, rows, strict=True):
        assert_same(got, fill(model, [row], params(top_k=20))[0])


# Memory.


class Allocations(TorchDispatchMode):
    """Elements of the largest tensor that was made, and the most bytes alive at a time; what was there before not counted."""

    def __init__(self, model: DreamModel):
        super().__init__()
        self.known = WeakIdKeyDictionary({p.untyped_storage(): None for p in model.parameters()})
        self.largest = self.alive = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self.known:
                self.note(tensor.untyped_storage(), tensor.element_size())
        return out

    def note(self, storage: torch.UntypedStorage, element_size: int) -> None:
        size = storage.nbytes()
        self.known[storage] = None
        self.largest = max(self.largest, size // element_size)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        finalize(storage, self.forget, size)

    def forget(self, size: int) -> None:
        self.alive -= size


@pytest.mark.parametrize(("algorithm", "top_k"), [*zip(ALGORITHMS, (None, 20, 20, None), strict=True)])
def test_logits_exist_in_small_pieces(monkeypatch, algorithm, top_k):
    """Neither of all positions nor of all hidden ones; and nothing is kept from one step to the next."""
    vocabulary, rows, num = 2000, 8, 24
    monkeypatch.setitem(engine.HEAD_ELEMENTS, "cpu", 20 * vocabulary)
    model = tiny_dream(vocab_size=vocabulary)
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(8, vocabulary, (rows, 16), generator=generator)
    peaks = []
    for steps in (6, 24):
        sampling = params(algorithm=algorithm, steps=steps, top_p=0.9, top_k=top_k)
        with Allocations(model) as made:
            sample(model, prompts, torch.ones_like(prompts), num_tokens=num, params=sampling, seeds=range(rows))
        assert 16 * vocabulary <= made.largest < 36 * vocabulary  # a piece, and what is too small for one of its own
        peaks.append(made.peak)
    assert peaks[1] < 1.1 * peaks[0]


# Holes anywhere.


@st.composite
def batches(draw) -> list[Canvas]:
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        hidden = draw(st.lists(st.booleans(), min_size=1, max_size=40).filter(any))
        ids = draw(st.lists(st.integers(0, 49), min_size=len(hidden), max_size=len(hidden)))  # [MASK] among them
        steps = draw(st.none() | st.integers(1, 12))
        row = Canvas(
            ids_L=torch.tensor(ids), hidden_L=torch.tensor(hidden), seed=draw(st.integers(0, 2**64 - 1)), steps=steps
        )
        rows += [row] * draw(st.integers(1, 2))
    return draw(st.permutations(rows))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=batches(),
    algorithm=st.sampled_from(ALGORITHMS),
    temperature=st.sampled_from([0, 0.7, 1.0]),
    alg_temp=st.sampled_from([0.0, 0.4]),
    top_k=st.sampled_from([None, 1]),  # 1: all positions are equally sure
    max_tokens=st.sampled_from([1, 100, 1 << 30]),
)
def test_holes_anywhere_are_filled_and_nothing_else(model, rows, algorithm, temperature, alg_temp, top_k, max_tokens):
    sampling = params(algorithm=algorithm, temperature=temperature, alg_temp=alg_temp, top_p=0.95, top_k=top_k, steps=5)
    for row, got in zip(rows, fill(model, rows, sampling, max_tokens), strict=True):
        given_L = ~row.hidden_L
        assert torch.equal(got.ids_L[given_L], row.ids_L[given_L])
        assert (got.step_map_L[given_L] == -1).all() and (got.probability_L[given_L] == 1).all()
        assert not (got.ids_L[row.hidden_L] == model.mask_token_id).any()
        steps_n, steps = got.step_map_L[row.hidden_L], row.steps or sampling.steps
        assert ((steps_n >= 0) & (steps_n < steps)).all()
        assert ((got.probability_L[row.hidden_L] > 0) & (got.probability_L[row.hidden_L] <= 1)).all()
        assert_same(got, fill(model, [row], sampling)[0])


# The benchmark's peer.


def test_golden_peer_of_the_benchmark():
    """The transcription that `make bench-sampler` measures does what Dream's own code did."""
    model = load_model(golden_file("generate/config.json").parent)
    cases = [case for case in golden_json("generate/deterministic.json")["deterministic"] if not case["attention_mask"]]
    assert {case["alg"] for case in cases} == set(ALGORITHMS)
    for case in cases:
        prompt_BP = torch.tensor(case["prompt_ids"])
        ids_BL = torch.nn.functional.pad(prompt_BP, (0, case["max_new_tokens"]), value=model.mask_token_id)
        with torch.random.fork_rng():
            torch.manual_seed(case["seed"] or 0)
            got_BL = peer_generate(model, ids_BL, params_of(case))
        assert torch.equal(got_BL, torch.tensor(case["sequences"])), case["id"]
