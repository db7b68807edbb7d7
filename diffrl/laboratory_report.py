"""What the estimator laboratory found, for people and programs: a table, a JSON object, a picture."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffrl.laboratory import (
    EQUAL_PASSES,
    UNIT,
    Interval,
    Measurement,
    Truth,
    Weights,
    effective_samples,
    replace_t,
    simulate_weights,
)

PICTURE = "variance"  # .svg and .png
# Okabe and Ito's colours, which people tell apart whatever colours they see; marks differ too.
LOOKS = {
    "coupled": ("#0072B2", "o"),
    "decoupled": ("#D55E00", "s"),
    "coupled_normalized": ("#009E73", "^"),
    "monte_carlo": ("#E69F00", "D"),
    "full_mask": ("#000000", "*"),
}
OTHER = ("#CC79A7", "v")


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """Findings(model="runs/quickstart/sft/model", settings={"draws": 64, ...}, truth=Truth(...), found=(Measurement(...), ...),
    left_out=("coupled_normalized, ...: t_min: 0.2 must ...",))"""

    model: str
    settings: Mapping[str, Any]
    truth: Truth
    found: Sequence[Measurement]
    left_out: Sequence[str]

    @property
    def unit(self) -> Measurement:
        """What effective sample sizes are counted in."""
        return next(m for m in self.found if m.variant == replace_t(UNIT, m.variant.options))


def weights_by_variant(findings: Findings) -> dict[tuple[str, int], dict[str, Weights]]:
    """Simulated, of every estimator and lambda at the first t."""
    first = findings.found[0].variant.t
    at_first = {(m.variant.estimator, m.variant.size): m.variant for m in findings.found if m.variant.t == first}
    return {key: simulate_weights(variant.estimator, variant.options, rows=10_000) for key, variant in at_first.items()}


# JSON


def as_json(findings: Findings, weights: Mapping[tuple[str, int], Mapping[str, Weights]]) -> dict[str, Any]:
    truth, unit = findings.truth, findings.unit
    return {
        "model": findings.model,
        "settings": dict(findings.settings),
        "truth": {
            "t_min": truth.t_range[0],
            "t_max": truth.t_range[1],
            "masks": truth.num_masks,
            "sequence_mean": float(truth.sequence_B.mean()),
            "sequence_mean_error": truth.mean_error,
        },
        "estimators": [
            {
                "estimator": m.variant.estimator,
                "size": m.variant.size,
                "masks": m.variant.masks,
                "t": m.variant.t,
                **{key: value for key, value in asdict(m).items() if key != "variant"},
                f"error_at_{EQUAL_PASSES}_passes": m.error,
                "effective_samples": effective_samples(m, unit),
            }
            for m in findings.found
        ],
        "weights": [
            {"estimator": name, "size": size, **{part: asdict(w) for part, w in parts.items()}}
            for (name, size), parts in weights.items()
        ],
        "left_out": list(findings.left_out),
    }


# Words


def as_text(findings: Findings, weights: Mapping[tuple[str, int], Mapping[str, Weights]]) -> str:
    truth, unit = findings.truth, findings.unit
    heads = ["estimator", "size", "masks", "t"]
    biases = [[*heads, "passes", "ms", "bias/token", "rms", "bias/sequence", "raw", f"error@{EQUAL_PASSES}"]]
    variances = [[*heads, "var/token", "var/sequence", "ESS", "ESS/pass", "var siblings", "var step"]]
    for m in findings.found:
        name = [m.variant.estimator, str(m.variant.size), m.variant.masks, m.variant.t]
        effective = effective_samples(m, unit)
        biases.append(
            [
                *(*name, f"{m.passes:.2f}", f"{1000 * m.seconds:.2f}"),
                *(f"{m.token_bias:+.4f}", f"{m.token_bias_rms:.4f}"),
                *(
                    f"{m.sequence_bias:+.3f} ±{m.sequence_bias_error:.3f}",
                    f"{m.raw_sequence_bias:+.2f}",
                    f"{m.error:.3g}",
                ),
            ]
        )
        variances.append(
            [
                *(*name, f"{m.token_variance:.4g}", ranged(m.sequence_variance)),
                *(("-", "-") if effective is None else (f"{effective:.3g}", f"{effective / m.passes:.3g}")),
                *(ranged(m.sibling_variance), f"{m.step_variance.value:.3g}"),
            ]
        )
    low, high = truth.t_range
    lines = [
        f"truth: mean of the ELBO integrand over t in {low:g}..{high:g}, from {truth.num_masks} masks a completion: "
        f"{float(truth.sequence_B.mean()):.3f} ±{truth.mean_error:.3f} nats",
        "",
        *table(biases),
        f"passes, ms: per completion and draw. Biases in nats, of estimates divided by their declared mean weight (raw: not), "
        f"± standard error. error@{EQUAL_PASSES}:",
        f"root mean square error of a completion when draws are averaged up to {EQUAL_PASSES} passes.",
        "",
        *table(variances),
        "Over draws of masks, in nats²; [95%]. ESS: single independent masks (monte_carlo, size 1) of the same variance. "
        "siblings: the difference of two",
        "completions of a prompt, all that advantages see. step: the mean of all completions.",
        "",
        "weights of a token, by simulation: `bare` random views before the factor of eq. 13, `pairs` with it, `all` with the "
        "fully hidden view",
        *table(
            [
                ["estimator", "size", "views", "mean", "variance", "largest", "silent"],
                *(
                    [
                        *(name, str(size), part, f"{w.mean:.2f}", f"{w.variance:.3f}"),
                        *(f"{w.largest:.2f}", f"{100 * w.silent:.1f}%"),
                    ]
                    for (name, size), parts in weights.items()
                    for part, w in parts.items()
                ),
            ]
        ),
        *(f"left out: {line}" for line in findings.left_out),
    ]
    return "\n".join(lines)


def ranged(found: Interval) -> str:
    return f"{found.value:.3g} [{found.low:.3g}..{found.high:.3g}]"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns, the first row their names."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


# The picture


def draw(findings: Findings, folder: Path) -> list[Path]:
    """variance.svg and variance.png: bias, variance and that of sibling differences against forward passes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # takes a second
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.6))
    FigureCanvasAgg(figure)
    figure.subplots_adjust(left=0.06, right=0.985, bottom=0.25, top=0.87, wspace=0.22)
    figure.suptitle(f"Estimates of completion log-probs: {findings.model}", fontsize="medium")
    first = findings.found[0].variant.t
    shown = [m for m in findings.found if m.variant.t == first]
    lines: dict[tuple[str, str], list[Measurement]] = {}
    for m in sorted(shown, key=lambda m: m.passes):
        lines.setdefault((m.variant.estimator, m.variant.masks), []).append(m)
    panels = (
        ("Bias of a completion", "|bias| (nats)", False),
        ("Variance of a completion", "variance (nats²)", False),
        ("Variance of the difference of two siblings", "variance (nats²)", True),
    )
    for number, (title, label, both) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        for (name, masks), own in lines.items():
            if masks == "shared" and not both:
                continue
            color, mark = LOOKS.get(name, OTHER)
            look: dict[str, Any] = {"color": color, "marker": mark, "markersize": 9 if mark == "*" else 6}
            look |= {"markerfacecolor": "white", "linestyle": "--"} if masks == "shared" else {"linestyle": "-"}
            passes = [m.passes for m in own]
            if number == 1:
                values = [abs(m.sequence_bias) for m in own]
                axes.errorbar(
                    passes, values, [1.96 * m.sequence_bias_error for m in own], capsize=2, label=name, **look
                )
                continue
            found = [m.sibling_variance if both else m.sequence_variance for m in own]
            if all(f.value < 1e-12 for f in found):  # no place on a logarithmic axis
                axes.text(0.02, 0.02, f"{name}: 0", transform=axes.transAxes, fontsize="small")
                continue
            axes.errorbar(
                passes,
                [f.value for f in found],
                [[max(0.0, f.value - f.low) for f in found], [max(0.0, f.high - f.value) for f in found]],
                capsize=2,
                label=name,
                **look,
            )
        axes.set_title(title, fontsize="medium")
        axes.set(xlabel="forward passes per completion and draw", ylabel=label)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if number > 1:
            axes.set_yscale("log")
        axes.grid(alpha=0.25, which="both")
        axes.spines[["top", "right"]].set_visible(False)
        if number == 1:
            axes.legend(frameon=False, fontsize="small")
    figure.text(
        0.06,
        0.03,
        f"t {first}. Marks along a line: lambda (monte_carlo: masks) going up; filled: own masks, open: siblings share "
        f"them. Estimates are divided by their declared mean "
        f"weight.\nBias against the mean of the ELBO integrand over t in {findings.truth.t_range[0]:g}.."
        f"{findings.truth.t_range[1]:g}. Bars: 95%, over {findings.settings['draws']} draws of masks.",
        fontsize="small",
    )
    paths = [folder / f"{PICTURE}.{kind}" for kind in ("svg", "png")]
    for path in paths:
        figure.savefig(path, format=path.suffix[1:], dpi=100)
    return paths
