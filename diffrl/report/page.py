"""The page: sections in the order in which a reader asks, each left out where there is nothing to show."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np

from diffrl.board.index import VERDICTS
from diffrl.board.orders import AR_NESS, SAMPLES_PER_STEP
from diffrl.errors import ConfigError
from diffrl.files import write_whole
from diffrl.metrics import find
from diffrl.report import results
from diffrl.report.charts import NUM_STYLES, Curve, bars, brief, curve_of, line_chart, percent
from diffrl.report.evaluations import Evaluation, evaluation_table, open_evaluations
from diffrl.report.html import Html, el, join
from diffrl.report.runs import Group, ReportRun, differences, groups_of, open_runs, shown_value
from diffrl.report.samples import LEVELS, MAX_TOKENS, Sample, samples_of

CURVES = {  # metric -> title
    "reward/mean": "Reward",
    "reward/solved_frac": "Solved",
    "eval/pass@1": "Held-out pass@1",
    "loss/kl": "KL to the reference",
    "loss/diffusion": "Loss",
    "loss/nll": "Cross-entropy",
    "validation/diffusion": "Validation loss",
    "optim/grad_norm": "Gradient before clipping",
    "rollout/completion_tokens": "Length",
    "rollout/surprisal": "Surprisal",
}
ORDER_CURVES = {"order/local_ar@1": "Local AR-ness@1", "order/global_ar@1": "Global AR-ness@1"}
MAX_SAMPLES = 4  # runs of which rollouts are shown


def write_report(folders: Sequence[str], out: str, evaluations: Sequence[str] = ()) -> Path:
    """`evaluations`: folders of `diffrl eval`. Raises ConfigError for what is no run or no evaluation, or cannot be written."""
    file = Path(out)
    if file.is_dir() or not file.absolute().parent.is_dir():
        what = "is a folder" if file.is_dir() else f"cannot be written: there is no folder {file.absolute().parent}"
        raise ConfigError(f"--out: {out} {what}; give the name of a file, such as report.html")
    page = page_of(open_runs(folders), open_evaluations(evaluations))
    try:
        write_whole(file, f"{page}\n")
    except OSError as error:
        raise ConfigError(f"--out: {out} cannot be written ({error.strerror}); name another file") from None
    return file


def page_of(runs: Sequence[ReportRun], evaluations: Mapping[str, Evaluation]) -> Html:
    groups = groups_of(runs)
    tables = [results.overview(runs), results.held_out(runs), results.over_seeds(groups), evaluation_table(evaluations)]
    sections = {
        "Results": [*tables, more_rates(runs)],
        "Curves": curves(groups),
        "Decoding order": decoding_order(groups),
        "Verdicts": verdicts(groups),
        "Rollouts": rollouts([group.runs[0] for group in groups]),
        "Configuration": configuration(runs),
        "Notes": notes(runs),  # last: the others may add to them
    }
    there = {title: [part for part in parts if part] for title, parts in sections.items()}
    there = {title: parts for title, parts in there.items() if parts}
    links = [el("a", title, href=f"#{anchor(title)}") for title in there]
    bodies = [section(title, parts) for title, parts in there.items()]
    names = ", ".join(run.name for run in runs)
    title = f"diffrl report: {names}" if len(runs) < 4 else f"diffrl report: {len(runs)} runs"
    style = style_sheet()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", Html(style)),
    )
    navigation = el("nav", *links, aria_label="Sections")
    header = el("header", el("p", "diffrl report", cls="brand"), el("h1", heading(runs)), navigation)
    body = el("body", header, el("main", *bodies))
    return join([Html("<!doctype html>\n"), el("html", head, body, lang="en")])


def section(title: str, parts: Sequence[Html]) -> Html:
    name = anchor(title)
    return el("section", el("h2", title, id=f"{name}-title"), *parts, id=name, aria_labelledby=f"{name}-title")


def heading(runs: Sequence[ReportRun]) -> str:
    return " and ".join(run.name for run in runs) if len(runs) < 3 else f"{len(runs)} runs"


def anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def style_sheet() -> str:
    return files("diffrl.report").joinpath("style.css").read_text()


def more_rates(runs: Sequence[ReportRun]) -> Html | None:
    found = results.all_sets(runs)
    return el("details", el("summary", "All pass rates"), found) if found else None


def curves(groups: Sequence[Group]) -> list[Html | None]:
    drawn = charts(groups, CURVES)
    return [] if drawn is None else [legend(groups), drawn]


def legend(groups: Sequence[Group]) -> Html | None:
    """Which line is whose."""
    if len(groups) == 1 and len(groups[0].runs) == 1:
        return None
    keys = [el("li", key(group.number), group.label) for group in groups]
    seeds = any(len(group.runs) > 1 for group in groups)
    told = "The line is the mean over the seeds of a configuration, the band reaches from the smallest to the largest."
    return join([el("ul", *keys, cls="legend"), el("p", told, cls="hint") if seeds else None])


def key(number: int) -> Html:
    line = el("line", x1=1, x2=27, y1=5, y2=5, cls=f"line s{number % NUM_STYLES}")
    return el("svg", line, viewBox="0 0 28 10", cls="key", aria_hidden="true")


def charts(groups: Sequence[Group], titles: dict[str, str], **options: tuple[float, float]) -> Html | None:
    drawn = []
    for name, title in titles.items():
        curves = [curve for group in groups if (curve := curve_of(group, name)) is not None]
        if curves:
            found = find(name)
            drawn.append(line_chart(title, found[0].unit if found else "", curves, **options))
    return el("div", *drawn, cls="charts") if drawn else None


def decoding_order(groups: Sequence[Group]) -> list[Html | None]:
    """AR-ness over the training: what the run measured, or what its rollouts say."""
    measured = charts(groups, ORDER_CURVES, limits=(0.0, 1.0))
    if measured is None:
        drawn = [stored_order(groups, number, name) for number, (name, _, _) in enumerate(AR_NESS)]
        measured = el("div", *drawn, cls="charts") if all(drawn) else None
        how = f"Of up to {SAMPLES_PER_STEP} rollouts of a step. "
    else:
        how = "Of all rollouts of a step. "
    if measured is None:
        return []
    told = (
        "1: strictly from left to right, as an autoregressive model decodes. Local: the next token is the right-hand neighbour "
        "of the one before; global: it is the leftmost of those that are still hidden (arXiv 2506.20639)."
    )
    return [el("p", how + told, cls="hint"), measured]


def stored_order(groups: Sequence[Group], number: int, name: str) -> Html | None:
    curves = []
    for group in groups:
        found = [{o.step + 1: v for o in run.orders if (v := o.ar_ness[number]) is not None} for run in group.runs]
        found = [values for values in found if values]
        steps = sorted(set.intersection(*(set(values) for values in found))) if found else []
        if steps:
            rows = np.array([[values[step] for step in steps] for values in found])
            ends = {k: v.tolist() for k, v in (("mean", rows.mean(0)), ("low", rows.min(0)), ("high", rows.max(0)))}
            curves.append(Curve(label=group.label, number=group.number, steps=steps, num_seeds=len(found), **ends))
    return line_chart(name, "share of steps", curves, limits=(0.0, 1.0)) if curves else None


def verdicts(groups: Sequence[Group]) -> list[Html | None]:
    """How rollouts fared, configuration beside configuration."""
    shown = []
    for group in groups:
        steps, shares = verdict_shares(group)
        if not len(steps):
            continue
        tenth = max(1, len(steps) // 10)
        keys = []
        for name, share in shares.items():
            ends = f"{percent(float(share[:tenth].mean()))} → {percent(float(share[-tenth:].mean()))}"
            keys.append(el("li", swatch(name), f"{name} ", el("small", ends)))
        picture = bars(steps, list(shares.values()), list(shares), f"Verdicts of {group.label}")
        caption = el("figcaption", el("b", group.label))
        shown.append(el("figure", caption, picture, el("ul", *keys, cls="legend"), cls="card chart"))
    if not shown:
        return []
    told = (
        "Rollouts by what their graded tests said: all passed, some passed, or, where none did, how the first one ended. In the "
        "legends: the first and the last tenth of the steps."
    )
    return [el("p", told, cls="hint"), el("div", *shown, cls="charts")]


def verdict_shares(group: Group) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Steps, and for each verdict that there was its share of every step's rollouts, of all seeds together."""
    snapshots = [run.run.snapshot for run in group.runs]
    steps = np.unique(np.concatenate([snapshot.steps for snapshot in snapshots]))
    counts = np.zeros((len(VERDICTS), len(steps)))
    for snapshot in snapshots:
        np.add.at(counts, (snapshot.columns["verdict"], np.searchsorted(steps, snapshot.columns["step"])), 1)
    shares = counts / np.maximum(1, counts.sum(axis=0))
    return steps, {name: share for name, share in zip(VERDICTS, shares, strict=True) if share.any()}


def swatch(name: str) -> Html:
    box = el("rect", width=10, height=10, rx=2, cls=f"v-{name.replace(' ', '-')}")
    return el("svg", box, viewBox="0 0 10 10", cls="swatch", aria_hidden="true")


def rollouts(runs: Sequence[ReportRun]) -> list[Html | None]:
    """Kind by kind, run beside run."""
    found = {run.name: {sample.kind: sample for sample in samples_of(run)} for run in runs[:MAX_SAMPLES]}
    found = {name: samples for name, samples in found.items() if samples}
    if not found:
        return []
    scale = el("span", *(el("i", cls=f"o{n}") for n in range(LEVELS)), cls="scale", aria_hidden="true")
    told = el(
        "p", "Tokens by when they were revealed: first ", scale, " last. Step and probability on hover.", cls="hint"
    )
    kinds = dict.fromkeys(kind for samples in found.values() for kind in samples)
    rows = []
    for kind in kinds:
        cards = [card(name, samples[kind], len(found) > 1) for name, samples in found.items() if kind in samples]
        rows += [el("h3", kind.capitalize()), el("div", *cards, cls="samples")]
    more = f"Of the first {MAX_SAMPLES} configurations." if len(runs) > MAX_SAMPLES else None
    return [told, el("p", more, cls="hint") if more else None, *rows]


def card(name: str, sample: Sample, several: bool) -> Html:
    """One rollout; all in it that a model or a program wrote is text."""
    spans = [
        el(
            "span",
            token.text.replace("\n", "↵\n"),
            cls=f"o{token.level}",
            title=words_of(token.step, token.probability),
        )
        for token in sample.tokens
        if token.text
    ]
    if sample.left_out:
        spans.append(el("small", f" {sample.left_out} tokens more than {MAX_TOKENS} are left out"))
    facts = f"reward {brief(sample.reward)} · {sample.verdict or 'no verdict'}"
    how = (
        f"{len(sample.tokens)} tokens in {sample.num_steps} denoising steps"
        if sample.tokens
        else "no tokenizer: text alone"
    )
    where = f"{sample.problem} · step {sample.step + 1} · {sample.place} · {how}"
    return el(
        "article",
        el("h4", name) if several else None,
        el("p", el("b", facts), cls="facts"),
        el("p", where, cls="hint"),
        el("details", el("summary", "Prompt"), el("pre", sample.prompt)),
        el("pre", *(spans or [sample.text]), cls="tokens"),
        el("p", sample.detail, cls="hint") if sample.detail else None,
        cls="card",
    )


def words_of(step: int, probability: float | None) -> str:
    return f"step {step}" if probability is None else f"step {step}, probability {probability:.3f}"


def configuration(runs: Sequence[ReportRun]) -> list[Html | None]:
    differing = differences(runs) if len(runs) > 1 else []
    rows = [[field, *values, meaning] for field, values, meaning in differing]
    heads = ["key", *(run.name for run in runs), ""]
    if not any(meaning for _, _, meaning in differing):
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    compared = results.table(heads, rows, "What differs between the runs, but for run_dir") if rows else None
    same = el("p", "The configurations are equal but for run_dir.", cls="hint") if len(runs) > 1 and not rows else None
    whole = [
        el("details", el("summary", f"{run.name}: the whole configuration"), el("pre", config_text(run)))
        for run in runs
        if run.config
    ]
    return [compared, same, *whole]


def config_text(run: ReportRun) -> str:
    return "\n".join(f"{field}: {shown_value(value)}" for field, value in run.config.items())


def notes(runs: Sequence[ReportRun]) -> list[Html | None]:
    """What a reader should know of the folders."""
    told = [(run, note) for run in runs for note in run.notes]
    return [el("ul", *(el("li", el("b", run.name), f": {note}") for run, note in told))] if told else []
