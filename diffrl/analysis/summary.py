"""summary.md of an analysis, and the lines that the command prints: from tables alone."""

from collections.abc import Mapping, Sequence
from typing import Any

from diffrl.analysis.claims import CLAIMS
from diffrl.analysis.results import Table

PICTURES = {
    "ar_ness": "Local and global AR-ness@k",
    "decoding_order": "When each position is revealed",
    "entropy_sink": "Confidence at the first steps (entropy sink)",
    "pass_at_k": "pass@k by temperature",
    "temperature": "AR-ness and diversity by temperature",
    "steps": "Accuracy and AR-ness by number of steps",
    "math": "Code against math",
    "training": "During training",
}


def claim_lines(tables: Mapping[str, Table]) -> list[str]:
    """One per claim: `seen       temperature lowers AR-ness: rl, global@1 -0.090 [95% -0.120..-0.060] ...`."""
    return [
        f"{row['verdict']:<10} {row['claim']}: {row['source']}, {row['measure']} {change_of(row)}, "
        f"{row['before']} {row['mean_before']:.3f}, {row['after']} {row['mean_after']:.3f}"
        for row in claims(tables)
    ]


def change_of(row: Mapping[str, Any]) -> str:
    return f"{row['gain']:+.3f} [95% {row['low']:+.3f}..{row['high']:+.3f}]"


def claims(tables: Mapping[str, Table]) -> list[dict[str, Any]]:
    rows = tables["claims"]["rows"] if "claims" in tables else []
    return sorted(rows, key=lambda row: CLAIMS.index(row["claim"]))


def summary(tables: Mapping[str, Table], sources: Sequence[tuple[str, str]], missing: Sequence[str]) -> str:
    """Markdown. `sources`: (name, what it is); `missing`: what could not be done, and why."""
    lines = ["# Analysis", "", "| source | |", "|---|---|", *(f"| {name} | {what} |" for name, what in sources), ""]
    lines += [
        "## The paper's claims",
        "",
        "A claim is *seen* where the whole 95% interval of the difference lies on its side of 0, *not seen* where no part of "
        "it does, else *undecided*. Intervals are percentile bootstraps over problems, paired where both sides have the same "
        "problems; they cover neither other seeds nor another training run, and are not widened for the number of claims.",
        "",
        "| claim | source | measure | before | after | difference, 95% interval | problems | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in claims(tables):
        pairing = f"{row['count']}{'' if row['paired'] else ', not paired'}"
        lines.append(
            f"| {row['claim']} | {row['source']} | {row['measure']} | {row['before']}: {row['mean_before']:.3f} "
            f"| {row['after']}: {row['mean_after']:.3f} | {change_of(row)} | {pairing} | **{row['verdict']}** |"
        )
    lines += ["", *(f"- {line}" for line in missing)]
    if "steps" in tables:
        lines += ["", "## Steps", "", *step_table(tables["steps"]["rows"])]
    if "temperature" in tables:
        lines += ["", "## Temperature", "", *temperature_table(tables["temperature"]["rows"])]
    for name, title in PICTURES.items():
        if name in tables:
            lines += ["", f"## {title}", "", f"![{title}]({name}.svg)", "", f"Table: [{name}.json]({name}.json)"]
    return "\n".join(lines) + "\n"


def step_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| source | steps | forward passes | pass@1 | lost against full steps | global AR-ness@1 |",
        "|---|---|---|---|---|---|",
    ]
    for source, steps in dict.fromkeys((row["source"], row["steps"]) for row in rows):
        own = {row["measure"]: row for row in rows if (row["source"], row["steps"]) == (source, steps)}
        passes = next(iter(own.values()))["passes"]
        cells = [interval_of(own.get(name)) for name in ("pass@1", "loss", "global@1")]
        lines.append(f"| {source} | {steps} | {passes:.1f} | {' | '.join(cells)} |")
    return lines


def temperature_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = ("pass@1", "local@1", "global@1", "order_diversity", "token_diversity")
    lines = [f"| source | temperature | {' | '.join(names)} |", "|---" * (2 + len(names)) + "|"]
    for source, temperature in dict.fromkeys((row["source"], row["temperature"]) for row in rows):
        own = {row["measure"]: row for row in rows if (row["source"], row["temperature"]) == (source, temperature)}
        lines.append(f"| {source} | {temperature:g} | {' | '.join(interval_of(own.get(name)) for name in names)} |")
    return lines


def interval_of(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
