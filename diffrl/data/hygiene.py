"""Problems that should not be trained on, found by their text: copies of benchmarks, and copies of each other.

Contamination: a text of a benchmark is a set of n-grams: a statement's of its words, a solution's of its tokens. A training
problem holds it when at least `min_share` of them occur in the problem's prompt, tests or solution. A text shorter than an
n-gram counts as one n-gram, and one of less than `min_words` or `min_tokens` is not looked for.

Duplicates: `duplicate` is the same question (prompt and shown tests, whatever their case and spaces); `near_duplicate` has
a Jaccard similarity of at least `threshold` between the shingles of prompt and tests, which is computed exactly for all
pairs that MinHash finds likely (datasketch). The first of a kind stays. The two prompts of an AceCode problem are one problem.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import xxhash

from diffrl.data.row_files import Row, read_rows
from diffrl.types import Problem

STATEMENTS = ("prompt", "text", "question", "instruct_prompt", "complete_prompt")  # fields of benchmarks' rows
SOLUTIONS = ("canonical_solution", "code", "solution")
IDS = ("task_id", "id", "name")
SHINGLE = 3  # tokens
NUM_PERM = 128

Part = Literal["statement", "solution"]
Ngrams = frozenset[tuple[int, int]]  # (length, hash)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Finding(problem_id="a/7", kind="contaminated", other="humaneval HumanEval/0", share=0.83, detail="check if in given ...")

    Kinds: contaminated, duplicate, near_duplicate, and of the judge (actors/hygiene.py) broken, flaky: these are left out;
    passes_empty, unjudged: these are only told.
    """

    problem_id: str
    kind: str
    other: str = ""  # what it is a copy of
    share: float = 1.0
    detail: str = ""


LEFT_OUT = ("contaminated", "duplicate", "near_duplicate", "broken", "flaky")


@dataclass(frozen=True, slots=True, kw_only=True)
class NgramOptions:
    """Lengths of n-grams, which unrelated texts do not share."""

    words: int = 10  # of a statement's n-grams
    tokens: int = 20  # of a solution's
    min_words: int = 8
    min_tokens: int = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One text of a benchmark. Item(name="humaneval HumanEval/0", part="statement", ngrams=frozenset({(10, 8125...), ...}))"""

    name: str
    part: Part
    ngrams: Ngrams


class Contamination:
    """An index of benchmarks."""

    def __init__(self, items: Sequence[Item]):
        self.items = items
        self.holders: dict[Part, dict[tuple[int, int], list[int]]] = {"statement": {}, "solution": {}}
        for number, item in enumerate(items):
            for ngram in item.ngrams:
                self.holders[item.part].setdefault(ngram, []).append(number)
        self.lengths = {part: sorted({length for length, _ in index}) for part, index in self.holders.items()}

    def finding(self, problem: Problem, min_share: float) -> Finding | None:
        """The text of which the problem holds the largest share, if that is enough; of several the longest."""
        text = "\n".join((problem.prompt, problem.solution or "", *problem.prompt_tests, *problem.reward_tests))
        held: dict[int, set[tuple[int, int]]] = defaultdict(set)
        example: dict[int, str] = {}
        for part, index in self.holders.items():
            pieces = PIECES[part](text)
            for length in self.lengths[part]:
                for start, key in enumerate(hashed_ngrams(pieces, length)):
                    for number in index.get((length, key), ()):
                        held[number].add((length, key))
                        example.setdefault(number, " ".join(pieces[start : start + length]))
        shares = {number: (len(found) / len(self.items[number].ngrams), len(found)) for number, found in held.items()}
        best = max(shares, key=lambda number: shares[number], default=None)
        if best is None or shares[best][0] < min_share:
            return None
        item = self.items[best]
        return Finding(
            problem_id=problem.id,
            kind="contaminated",
            other=item.name,
            share=shares[best][0],
            detail=f"{item.part}: {example[best]}",
        )


def benchmark_items(name: str, path: str | Path, options: NgramOptions) -> list[Item]:
    """The texts of a benchmark's own file: HumanEval(+), MBPP(+), BigCodeBench, or any rows with such fields. Raises
    ValueError for a file that cannot be read or has none of the fields."""
    items = []
    for place, row in read_rows(Path(path)):
        statements, solutions = texts(row, STATEMENTS), texts(row, SOLUTIONS)
        if not statements and not solutions:
            fields = ", ".join((*STATEMENTS, *SOLUTIONS))
            raise ValueError(f"{path} {place}: no benchmark row: it has none of the text fields {fields}")
        id_ = f"{name} {next((row[field] for field in IDS if row.get(field) is not None), place)}"
        for text in statements:
            ngrams = ngrams_of(words_of(text), options.words, options.min_words)
            items.append(Item(name=id_, part="statement", ngrams=ngrams))
        for text in solutions:
            ngrams = ngrams_of(tokens_of(text), options.tokens, options.min_tokens)
            items.append(Item(name=id_, part="solution", ngrams=ngrams))
    return items


def texts(row: Row, fields: Sequence[str]) -> list[str]:
    return [row[field] for field in fields if isinstance(row.get(field), str)]


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def tokens_of(text: str) -> list[str]:
    """Names, numbers and signs, whatever the spaces."""
    return re.findall(r"[A-Za-z_]\w*|\d+|[^\w\s]", text)


PIECES: dict[Part, Callable[[str], list[str]]] = {"statement": words_of, "solution": tokens_of}


def ngrams_of(pieces: Sequence[str], length: int, least: int) -> Ngrams:
    """(length, hash) of each n-gram; of a shorter text the whole, and nothing of one with fewer than `least` pieces."""
    length = min(length, len(pieces))
    return frozenset((length, key) for key in hashed_ngrams(pieces, length)) if length >= least else frozenset()


def hashed_ngrams(pieces: Sequence[str], length: int) -> Iterator[int]:
    for start in range(len(pieces) - length + 1):
        yield xxhash.xxh3_64_intdigest(" ".join(pieces[start : start + length]).encode(errors="replace"))


def contaminated(problems: Iterable[Problem], index: Contamination, min_share: float) -> Iterator[Finding]:
    for problem in problems:
        if (finding := index.finding(problem, min_share)) is not None:
            yield finding


def duplicates(problems: Iterable[Problem], threshold: float = 0.8) -> Iterator[Finding]:
    """Of each problem that is a copy of one before it which stays, which that is. Ids must be unique."""
    from datasketch import MinHash, MinHashLSH  # brings scipy

    asked: dict[tuple[str, ...], str] = {}
    near = MinHashLSH(threshold=0.8 * threshold, num_perm=NUM_PERM)  # lower: it misses some at its own
    shingles: dict[str, np.ndarray] = {}
    for problem in problems:
        question = tuple(tokens_of("\n".join((problem.prompt, *problem.prompt_tests)).lower()))
        first = asked.setdefault(question, problem.id)
        if first != problem.id and task_of(first) != task_of(problem.id):
            yield Finding(problem_id=problem.id, kind="duplicate", other=first, detail=problem.prompt[:80])
            continue
        pieces = tokens_of("\n".join((problem.prompt, *problem.prompt_tests, *problem.reward_tests)))
        own = np.unique(np.fromiter(hashed_ngrams(pieces, min(SHINGLE, len(pieces))), np.uint64))
        sketch = MinHash(num_perm=NUM_PERM, hashfunc=xxhash.xxh32_intdigest)
        sketch.update_batch([bytes(value.data) for value in own])
        likely = [str(key) for key in near.query(sketch)]
        alike = {other: jaccard(own, shingles[other]) for other in likely if task_of(other) != task_of(problem.id)}
        other = max(alike, key=lambda key: alike[key], default=None)
        if other is not None and alike[other] >= threshold:
            yield Finding(
                problem_id=problem.id,
                kind="near_duplicate",
                other=other,
                share=alike[other],
                detail=problem.prompt[:80],
            )
            continue
        near.insert(problem.id, sketch)
        shingles[problem.id] = own


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / max(len(a) + len(b) - common, 1)


def task_of(problem_id: str) -> str:
    """What the two prompts of an AceCode problem have in common."""
    return problem_id.removesuffix("/signature")
