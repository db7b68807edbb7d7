"""What `diffrl eval` found, beside the runs: the results.json of its folders, as they are."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffrl.errors import ConfigError
from diffrl.report.charts import percent
from diffrl.report.html import Child, Html
from diffrl.report.results import shown_interval, table
from diffrl.report.runs import ABSENT

RESULTS = "results.json"
Evaluation = Mapping[str, Any]


def open_evaluations(folders: Sequence[str]) -> dict[str, Evaluation]:
    """By the names of their folders. Raises ConfigError."""
    found = {}
    for folder in folders:
        file = Path(folder) if folder.endswith(".json") else Path(folder) / RESULTS
        try:
            results = json.loads(file.read_text())
            whole = bool([row_of("", results, score) for score in results["scores"]])
        except OSError as error:
            raise ConfigError(
                f"--eval: {folder}: no {RESULTS} can be read ({error.strerror}); give the folder of a finished diffrl eval"
            ) from None
        except (ValueError, LookupError, TypeError, AttributeError):
            results, whole = None, False
        if not whole:
            raise ConfigError(f"--eval: {file} does not hold what diffrl eval writes; give the folder of one")
        found[folder] = results
    return found


def evaluation_table(evaluations: Mapping[str, Evaluation]) -> Html | None:
    """A row for each temperature of each."""
    rows = [row_of(name, results, score) for name, results in evaluations.items() for score in results["scores"]]
    if not rows:
        return None
    heads = list(dict.fromkeys(head for row in rows for head in row))
    last = ["trust: low", "masked"]
    heads = [head for head in heads if head not in last] + last
    caption = "Benchmarks: per cent of problems, in brackets 95% intervals by bootstrap over problems"
    return table(heads, [[row.get(head, ABSENT) for head in heads] for row in rows], caption)


def row_of(name: str, results: Evaluation, score: Mapping[str, Any]) -> dict[str, Child]:
    """A sample on which the judge failed is `masked`, and counts neither as right nor as wrong."""
    row: dict[str, Child] = {
        "evaluation": name,
        "benchmark": str(results["benchmark"]),
        "model": str(results["settings"].get("model", ABSENT)).partition(", sha256")[0],
        "temperature": f"{float(score['temperature']):g}",
        "samples": f"{int(score['num_samples'])} x {int(score['num_problems'])}",
    }
    for key, value in score.items():
        if "pass@" in key:
            found = None if value is None else (float(value["mean"]), float(value["low"]), float(value["high"]))
            row[key.replace("base_", "base tests ")] = shown_interval(found)
    return row | {"trust: low": percent(float(score["low_trust_share"])), "masked": str(int(score["num_masked"]))}
