"""Plots of an analysis, each drawn from its table alone: `PLOTS[name](table)` is a matplotlib Figure, without global state.

Colours are those of Okabe and Ito, sequences of viridis; lines differ in their marks too. Bands and bars are 95% intervals over
problems.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffrl.analysis.results import Table

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = ("o", "s", "^", "D", "v", "P", "X")
DPI = 120
PANEL = (4.6, 3.6)  # inches
MOST_COLUMNS = 3
Row = Mapping[str, Any]


def write_plots(folder: Path, tables: Mapping[str, Table]) -> list[Path]:
    """`folder`/NAME.svg and .png of every table that has a plot. The same tables give the same bytes."""
    import matplotlib  # takes a second, and only the end of an analysis needs it

    written = []
    for name, plot in PLOTS.items():
        if name not in tables:
            continue
        with matplotlib.rc_context({"svg.hashsalt": "diffrl", "svg.fonttype": "none"}):
            figure = plot(tables[name])
            for path, options in (
                (folder / f"{name}.png", {"dpi": DPI}),
                (folder / f"{name}.svg", {"metadata": {"Date": None}}),
            ):
                figure.savefig(path, **options)
                figure.set_layout_engine("none")  # it takes as long as to draw, and has found the places
                written.append(path)
    return written


# What each table looks like


def ar_ness(table: Table) -> Any:
    sources = names_of(table["rows"], "source")
    figure, panels = panels_for(2)
    for axes, kind in zip(panels, ("local", "global"), strict=True):
        rows = [row for row in table["rows"] if row["kind"] == kind]
        for number, source in enumerate(sources):
            band(axes, "k", [row for row in rows if row["source"] == source], source, number)
        finish(axes, f"{kind} AR-ness@k", "k (tokens)", "share of steps", share=True, legend=len(sources) > 1)
        axes.set_xticks(sorted({row["k"] for row in rows}))
    return figure


def decoding_order(table: Table) -> Any:
    figure, panels = panels_for(len(table["rows"]), extra=0.5)
    image = None
    top = max(max(map(max, row["share"])) for row in table["rows"])
    for axes, row in zip(panels, table["rows"], strict=True):
        # Steps and positions count from 1 here; the outer edges of the first and last cells.
        extent = (0.5, row["num_steps"] + 0.5, row["num_positions"] + 0.5, 0.5)
        image = axes.imshow(row["share"], aspect="auto", cmap="viridis", extent=extent, vmin=0, vmax=top)
        axes.axhline(row["text_tokens"] + 0.5, color="white", linestyle="--", linewidth=1.2)
        axes.set(title=row["source"], xlabel="denoising step", ylabel="position in the window (tokens)")
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
    assert image is not None
    bar = figure.colorbar(image, ax=panels, fraction=0.05, pad=0.02)
    bar.set_label("share of the position's tokens")
    note = "dashed: mean length of the texts, end token included"
    figure.supxlabel(note, fontsize="small", color="0.3", x=0.01, horizontalalignment="left")
    return figure


def entropy_sink(table: Table) -> Any:
    sources = names_of(table["rows"], "source")
    figure, panels = panels_for(len(sources))
    for axes, source in zip(panels, sources, strict=True):
        for number, row in enumerate(row for row in table["rows"] if row["source"] == source):
            place = range(1, len(row["probability"]) + 1)
            values = [float("nan") if value is None else value for value in row["probability"]]
            mark = {"marker": MARKS[number], "markersize": 3.5, "markevery": max(1, len(values) // 16)}
            label = f"before reveal {row['look']}"
            axes.plot(place, values, color=COLORS[number % len(COLORS)], linewidth=1.5, label=label, **mark)
        finish(axes, source, "position behind the prefix (tokens)", "probability of the likeliest token", share=True)
    return figure


def pass_at_k(table: Table) -> Any:
    sources = names_of(table["rows"], "source")
    temperatures = sorted(names_of(table["rows"], "temperature"))
    ks = sorted(names_of(table["rows"], "k"))
    figure, panels = panels_for(len(sources))
    for axes, source in zip(panels, sources, strict=True):
        for number, temperature in enumerate(temperatures):
            rows = [r for r in table["rows"] if (r["source"], r["temperature"]) == (source, temperature)]
            color = ramp(number, len(temperatures))
            band(axes, "k", rows, f"temperature {temperature:g}", number, color=color)
        if len(ks) > 1:
            axes.set_xscale("log", base=2)
        axes.set_xticks(ks, [str(k) for k in ks])
        axes.minorticks_off()
        finish(axes, source, "k (samples per problem)", "pass@k", share=False)
    same_height(panels)
    return figure


def temperature(table: Table) -> Any:
    sources = names_of(table["rows"], "source")
    rows = {name: [r for r in table["rows"] if r["measure"] == name] for name in names_of(table["rows"], "measure")}
    wanted = (
        ("local@1", "local AR-ness@1", "share of steps"),
        ("global@1", "global AR-ness@1", "share of steps"),
        ("order_diversity", "order diversity", "share of pairs in another order"),
        ("token_diversity", "token diversity", "share of positions that differ"),
        ("distinct", "distinct texts", "share of samples"),
        ("pass@1", "accuracy", "pass@1"),
    )
    shown = [each for each in wanted if each[0] in rows]
    figure, panels = panels_for(len(shown))
    for axes, (name, title, unit) in zip(panels, shown, strict=True):
        for number, source in enumerate(sources):
            band(axes, "temperature", [r for r in rows[name] if r["source"] == source], source, number)
        finish(axes, title, "temperature", unit, legend=len(sources) > 1)
    return figure


def steps(table: Table) -> Any:
    sources = names_of(table["rows"], "source")
    wanted = (
        ("pass@1", "accuracy", "pass@1"),
        ("loss", "lost against full steps", "pass@1 at full steps less that at these"),
        ("global@1", "global AR-ness@1", "share of tokens"),
    )
    rows = {name: [r for r in table["rows"] if r["measure"] == name] for name, _, _ in wanted}
    shown = [each for each in wanted if rows[each[0]]]
    figure, panels = panels_for(len(shown))
    for axes, (name, title, unit) in zip(panels, shown, strict=True):
        for number, source in enumerate(sources):
            band(axes, "speedup", [r for r in rows[name] if r["source"] == source], source, number)
        ticks = sorted({(round(r["speedup"], 3), r["steps"]) for r in rows[name] if r["source"] == sources[0]})
        axes.set_xscale("log", base=2)
        axes.set_xticks([speed for speed, _ in ticks], [f"{speed:.3g}\n({n})" for speed, n in ticks])
        axes.minorticks_off()
        if name == "loss":
            axes.axhline(0, color="0.5", linewidth=0.8)
        finish(axes, title, "speed-up: times fewer forward passes (steps)", unit, legend=len(sources) > 1)
    return figure


def math(table: Table) -> Any:
    sources = names_of(table["rows"], "source")
    figure, panels = panels_for(2 * len(sources), columns=2)
    pairs = [(source, kind) for source in sources for kind in ("local", "global")]
    for axes, (source, kind) in zip(panels, pairs, strict=True):
        own = [row for row in table["rows"] if (row["source"], row["kind"]) == (source, kind)]
        for number, name in enumerate(("code", "math")):
            band(axes, "k", [row for row in own if row["set"] == name], name, number)
        finish(axes, f"{source}: {kind} AR-ness@k", "k (tokens)", "share of steps", share=True)
        axes.set_xticks(sorted({row["k"] for row in own}))
    return figure


def training(table: Table) -> Any:
    sources = names_of(table["rows"], "source")
    wanted = (
        ("local@1", "local AR-ness@1", "share of steps"),
        ("global@1", "global AR-ness@1", "share of steps"),
        ("order_diversity", "order diversity of siblings", "share of pairs in another order"),
        ("pass@1", "accuracy of rollouts", "pass@1"),
    )
    rows = {name: [r for r in table["rows"] if r["measure"] == name] for name, _, _ in wanted}
    shown = [each for each in wanted if rows[each[0]]]
    figure, panels = panels_for(len(shown), columns=2)
    for axes, (name, title, unit) in zip(panels, shown, strict=True):
        for number, source in enumerate(sources):
            own = [{**r, "step": r["step"] + 1} for r in rows[name] if r["source"] == source]
            band(axes, "step", own, source, number, mark=len(own) <= 40)
        finish(axes, title, "training step", unit, legend=len(sources) > 1)
    return figure


PLOTS: dict[str, Callable[[Table], Any]] = {
    "ar_ness": ar_ness,
    "decoding_order": decoding_order,
    "entropy_sink": entropy_sink,
    "pass_at_k": pass_at_k,
    "temperature": temperature,
    "steps": steps,
    "math": math,
    "training": training,
}


# What they have in common


def panels_for(count: int, *, columns: int | None = None, extra: float = 0.0) -> tuple[Any, list[Any]]:
    """A figure with so many axes in rows; `extra`: inches of width beside them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(count, columns or MOST_COLUMNS)
    rows = -(-count // columns)
    figure = Figure(figsize=(PANEL[0] * columns + extra, PANEL[1] * rows + 0.1), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, [figure.add_subplot(rows, columns, number + 1) for number in range(count)]


def names_of(rows: Sequence[Row], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def ramp(number: int, count: int) -> Any:
    """A colour for a place in an order, dark to light, never the palest."""
    from matplotlib import colormaps

    return colormaps["viridis"](0.85 * number / max(1, count - 1))


def band(
    axes: Any, key: str, rows: Sequence[Row], label: str, number: int, *, color: Any = None, mark: bool = True
) -> None:
    """A line through the means, with a mark each and the interval behind it."""
    rows = sorted(rows, key=lambda row: row[key])
    color = COLORS[number % len(COLORS)] if color is None else color
    place = [row[key] for row in rows]
    marks = {"marker": MARKS[number % len(MARKS)], "markersize": 5} if mark else {}
    axes.fill_between(place, [r["low"] for r in rows], [r["high"] for r in rows], color=color, alpha=0.15, linewidth=0)
    axes.plot(place, [row["mean"] for row in rows], color=color, linewidth=1.6, label=label, **marks)


def finish(axes: Any, title: str, x: str, y: str, *, share: bool = False, legend: bool = True) -> None:
    axes.set(title=title, xlabel=x, ylabel=y)
    if share:
        axes.set_ylim(-0.02, 1.02)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if legend:
        axes.legend(frameon=False, fontsize="small")


def same_height(panels: Sequence[Any]) -> None:
    limits = [axes.get_ylim() for axes in panels]
    for axes in panels:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
