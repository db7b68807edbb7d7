"""The Grafana dashboards of a run and its alerts as a Kubernetes object, made of diffrl/metrics.py and
cluster/monitoring/rules.yaml: `python -m actors.dashboards` writes what is committed below cluster/monitoring.

A panel names metrics; their units, legends and words come from where they are defined. The variables are those that the
Ray dashboard gives to what it embeds (datasource, SessionName, Cluster), and `run`.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diffrl.metrics import METRICS, STEP_ENDED_AT, STEPS, Metric

MONITORING = Path(__file__).parents[1] / "cluster" / "monitoring"
FILTER = 'SessionName=~"$SessionName",ray_io_cluster=~"$Cluster"'
BY_NAME: Mapping[str, Metric] = {metric.name: metric for metric in (*METRICS, STEPS, STEP_ENDED_AT)}
WIDTH, HEIGHT, ROW_WIDTH, ROW_HEIGHT = 8, 8, 24, 1
WINDOW = "5m"  # of counters: how many there were in it
# Ours to Grafana's; all others are written on the axis.
UNITS = {"s": "s", "MB": "mbytes", "bytes": "bytes", "chance": "percentunit", "unix time": "dateTimeFromNow"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """Of what is no metric of ours.

    Series(query='sum(ray_node_gpus_available{SessionName=~"$SessionName"})', legend="GPUs", help="GPUs of the cluster")
    """

    query: str
    legend: str
    help: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Panel(title="Memory", shows=("memory/{role}_mb",)): metrics of one unit, by their names, or series. A stat shows the
    last value alone. `number`: one that others know the panel by; None: the next free one."""

    title: str
    shows: Sequence[str | Series]
    unit: str = ""  # Grafana's; "": of the first metric
    kind: str = "timeseries"
    stacked: bool = False
    number: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    """Dashboard(name="learner", rows={"Loss": (panel, panel)}): uid diffrl-learner, rows by their titles."""

    name: str
    rows: Mapping[str, Sequence[Panel]]


def lines(title: str, *shows: str | Series, **options: Any) -> Panel:
    return Panel(title=title, shows=shows, **options)


def stat(title: str, *shows: str | Series, **options: Any) -> Panel:
    return Panel(title=title, shows=shows, kind="stat", **options)


def of_ray(query: str, legend: str, help: str) -> Series:
    """A metric of Ray's own; FILTER goes where the query has {}."""
    return Series(query=query.replace("{}", f"{{{FILTER}}}"), legend=legend, help=help)


PHASES = ("time/rollouts", "time/record", "time/learner", "time/publish", "time/pull")
LENGTHS = tuple(f"rollout/completion_tokens{which}" for which in ("", "_p50", "_p95", "_max"))
MEMORY = "ray_node_mem_used{} / ray_node_mem_total{}"
PODS = "while programs are judged in sandbox pods"
# The Ray dashboard's Overview shows panels 24 and 41 of the dashboard that its Metrics page embeds.
NODES = lines(
    "Node Count",
    of_ray("sum by (NodeType) (autoscaler_active_nodes{})", "active {{NodeType}}", "nodes that are there"),
    of_ray("sum by (NodeType) (autoscaler_pending_nodes{})", "pending {{NodeType}}", "nodes that are being started"),
    of_ray("sum by (NodeType) (autoscaler_recently_failed_nodes{})", "failed {{NodeType}}", "nodes that were lost"),
    number=24,
)
UTILIZATION = lines(
    "Cluster Utilization",
    of_ray("avg(ray_node_cpu_utilization{}) / 100", "CPUs", "busy share of the CPUs of all nodes"),
    of_ray(f"avg({MEMORY})", "memory", "used share of the memory of all nodes"),
    of_ray("avg(ray_node_gpus_utilization{}) / 100", "GPUs", "busy share of the GPUs of all nodes"),
    of_ray(
        "sum(ray_node_gram_used{}) / (sum(ray_node_gram_used{}) + sum(ray_node_gram_available{}))",
        "GPU memory",
        "used share of the memory of all GPUs",
    ),
    unit="percentunit",
    number=41,
)
DASHBOARDS = (
    Dashboard(
        name="pipeline",
        rows={
            "At a glance": (
                stat("Steps", "steps"),
                stat("Last step", "step_ended_at"),
                stat("Reward", "reward/mean"),
                stat("Solved", "reward/solved_frac"),
                stat("Held out", "eval/pass@1"),
                stat("Not judged", "sandbox/infra_error_frac"),
            ),
            "Where the time goes": (
                lines("A step by phase", *PHASES, stacked=True),
                lines("Workers without a call", "idle/{role}_frac"),
                lines("Calls that wait for a worker", "queue/{role}"),
                lines("A call about a group", "calls/{role}_p50_s", "calls/{role}_p95_s", "calls/{role}_max_s"),
                lines("Groups a second", "throughput/{role}_per_s"),
                lines("Groups that wait for their step", "queue/buffered"),
                lines("Tokens learned from", "throughput/learner_tokens_per_s"),
            ),
            "Weights": (
                lines("Version and staleness", "weights/version", "rollout/staleness_mean", "rollout/staleness_max"),
                lines("Published", "weights/bytes"),
                lines("Difference between learner and rollout workers", "sync/logprob_absdiff_max"),
            ),
            "What went wrong": (
                lines("Workers replaced", "restarts/{role}"),
                lines("Calls made again", "retries/{role}"),
                lines("Groups judged again", "rejudged/groups"),
                lines("Problems left out", "data/quarantined"),
            ),
            "Machines": (
                lines("Memory of the largest process of a role", "memory/{role}_mb"),
                lines("Memory of nodes", of_ray(MEMORY, "{{instance}}", "used share"), unit="percentunit"),
                lines(
                    "Object store",
                    of_ray("sum(ray_object_store_memory{}) by (Location)", "{{Location}}", "objects that Ray holds"),
                    unit="bytes",
                ),
                NODES,
                UTILIZATION,
            ),
        },
    ),
    Dashboard(
        name="rollouts",
        rows={
            "Completions": (
                lines("Length", *LENGTHS),
                lines("With an end token", "rollout/end_token_frac"),
                lines("Surprisal", "rollout/surprisal"),
                lines("Order of decoding", "order/local_ar@1", "order/global_ar@1"),
            ),
            "Speed": (
                lines("While they sample", "rollout/tokens_per_second"),
                lines("Sampled", "rollout/tokens"),
                lines("Positions that are no padding", "rollout/useful_share"),
                lines("Forward passes of a step", "rollout/forward_passes"),
                lines("Groups replaced", "rollout/replaced_groups"),
            ),
            "Approximate sampling": (
                lines("Agreement with exact sampling", "guard/agreement"),
                lines("Reward, against exact sampling", "guard/reward_difference"),
                lines("Confidence, against exact sampling", "guard/confidence_drift"),
                lines("Sampled both ways", "guard/rollouts"),
                lines("The guard has made it exact", "sampling/fallback"),
            ),
        },
    ),
    Dashboard(
        name="rewards",
        rows={
            "Rewards": (
                lines("Reward", "reward/mean", "reward/group_std"),
                lines("By part", "reward/part/{part}"),
                lines("Tests, programs, format", "reward/pass_rate", "reward/solved_frac", "reward/format"),
                lines("pass@k", "group/pass@{k}"),
                lines("Held out", "eval/pass@1"),
            ),
            "Groups": (
                lines("Outcomes", "group/all_pass_frac", "group/mixed_frac", "group/all_fail_frac", stacked=True),
                lines("Nothing to learn from", "reward/equal_groups_frac", "group/dropped_frac"),
                lines("Advantages", "advantage/std", "advantage/max"),
            ),
            "The judge": (
                lines("Verdicts", "verdicts/{status}", stacked=True),
                lines("Not judged, or of low trust", "sandbox/infra_error_frac", "sandbox/low_trust_frac"),
                lines("Failures of sandboxes", "pool/infra_errors"),
                lines("By class", "pool/errors/{error}"),
                lines("Sandboxes replaced", "pool/restarts"),
                lines("CPU of programs", "pool/cpu_ms"),
                lines("Slots in use", "pool/{worker}/busy_slots"),
                lines("Programs that wait for a slot", "pool/{worker}/queue_depth"),
                lines("Reward workers", "pool/workers"),
                lines(
                    "Sandbox pods",
                    Series(query="sum(diffrl_sandbox_busy)", legend="judged", help=f"programs, {PODS}"),
                    Series(query="sum(diffrl_sandbox_waiting)", legend="waiting", help=f"programs, {PODS}"),
                ),
            ),
        },
    ),
    Dashboard(
        name="learner",
        rows={
            "Loss": (
                lines("Loss", "loss/total", "loss/policy"),
                lines("KL to the reference", "loss/kl", "first/kl"),
                lines("New / old probability", "loss/ratio_mean", "first/ratio_mean"),
                lines("Clipped", "loss/clip_low_frac", "loss/clip_high_frac"),
            ),
            "Optimizer": (
                lines("Gradient", "optim/grad_norm"),
                lines("Learning rate", "optim/lr"),
                lines("Steps skipped", "optim/bad_steps"),
                lines("Skipped in a row", "optim/bad_in_a_row"),
            ),
            "What is learned from": (
                lines("Tokens", "batch/loss_tokens", "batch/prompt_tokens"),
                lines("Completions", "batch/loss_rows"),
                lines("Masks", "views/mask_ratio", "views/mask_ratio_std", "views/coverage"),
            ),
            "Supervised stages": (
                lines("Loss", "loss/diffusion", "validation/diffusion"),
                lines("Cross-entropy, not weighted", "loss/nll", "validation/nll"),
                lines("Hidden", "loss/hidden_frac"),
                lines("Tokens", "data/tokens"),
                lines("Tokens a second", "time/tokens_per_second"),
                lines("Time", "time/step", "time/rows", "time/validation"),
            ),
        },
    ),
)


def in_prometheus(metric: Metric) -> str:
    """What Ray makes of the name."""
    return f"ray_{metric.prometheus}" + ("" if metric.kind == "gauge" else "_total")


def series(name: str) -> Series:
    """Of a metric. A gauge has one value for each run, whichever process has told it; of counters, what the window had."""
    metric = BY_NAME[name]
    selected = f'{in_prometheus(metric)}{{{FILTER},run=~"$run"}}'
    labels = ", ".join(("run", *metric.labels))
    if metric.kind == "gauge":
        # Grafana's dates are in milliseconds.
        query = f"max by ({labels}) ({selected})" + (" * 1000" if metric.unit == "unix time" else "")
    else:
        query = f"sum by ({labels}) (increase({selected}[{WINDOW}]))"
    legend = " ".join(f"{{{{{label}}}}}" for label in ("run", *metric.labels))
    when = f"; only with {metric.when}" if metric.when else ""
    return Series(query=query, legend=legend, help=f"{metric.help} ({metric.unit}{when})")


def words(name: str, *, whole: bool = False) -> str:
    """reward/group_std: `group std`, or with the section. A label stands in the legend anyway."""
    plain = re.sub(r"\{\w+\}", "", name).strip("/_")
    return (plain if whole else plain.partition("/")[2] or plain).replace("/", " ").replace("_", " ").strip()


def shown(panel: Panel) -> Iterator[tuple[str, Series]]:
    """What the panel shows, and what it is called in the description."""
    names = [name for name in panel.shows if isinstance(name, str)]
    short = Counter(words(name) for name in names)
    for item in panel.shows:
        if isinstance(item, Series):
            yield item.legend, item
            continue
        one = series(item)
        legend = one.legend
        if len(panel.shows) > 1:
            legend = f"{legend} {words(item, whole=short[words(item)] > 1)}".strip()
        yield item, Series(query=one.query, legend=legend, help=one.help)


def unit_of(panel: Panel) -> tuple[str, str]:
    """Grafana's unit, and what stands on the axis."""
    first = panel.shows[0]
    if panel.unit or isinstance(first, Series):
        return panel.unit or "short", ""
    metric = BY_NAME[first]
    if metric.unit.startswith("share"):
        return "percentunit", metric.unit.removeprefix("share of ").replace("share", "")
    if metric.kind != "gauge":
        return "short", f"{metric.unit} in {WINDOW}"
    return UNITS.get(metric.unit, "short"), "" if metric.unit in UNITS else metric.unit


def panel_json(panel: Panel, number: int, place: Mapping[str, int]) -> dict[str, Any]:
    unit, axis = unit_of(panel)
    data = [
        {"expr": one.query, "legendFormat": one.legend, "refId": chr(ord("A") + index), "datasource": SOURCE}
        for index, (_, one) in enumerate(shown(panel))
    ]
    made: dict[str, Any] = {
        "id": number,
        "type": panel.kind,
        "title": panel.title,
        "description": "\n\n".join(f"`{name}`: {one.help}" for name, one in shown(panel)),
        "datasource": SOURCE,
        "gridPos": dict(place),
        "targets": data,
    }
    if panel.kind == "stat":
        made["fieldConfig"] = {"defaults": {"unit": unit}, "overrides": []}
        made["options"] = {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "none", "graphMode": "area"}
        return made
    style = {"axisLabel": axis, "fillOpacity": 40 if panel.stacked else 0, "showPoints": "never", "spanNulls": True}
    style["stacking"] = {"mode": "normal" if panel.stacked else "none"}
    made["fieldConfig"] = {"defaults": {"unit": unit, "custom": style}, "overrides": []}
    legend = {"displayMode": "table", "placement": "bottom", "calcs": ["lastNotNull"], "showLegend": True}
    made["options"] = {"legend": legend, "tooltip": {"mode": "multi", "sort": "desc"}}
    return made


SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def variable(name: str, query: str, help: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "type": "query",
        "description": help,
        "datasource": SOURCE,
        "definition": query,
        "query": {"query": query, "refId": name},
        "refresh": 2,  # whenever the time range changes
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
        "sort": 2,
        **more,
    }


def variables() -> list[dict[str, Any]]:
    steps = in_prometheus(STEPS)
    source = {"name": "datasource", "type": "datasource", "query": "prometheus", "refresh": 1, "hide": 2}
    node = "ray_node_mem_total"
    return [
        source,
        variable("SessionName", f"label_values({node}, SessionName)", "Sessions of Ray: one for each start of a head."),
        variable("Cluster", f"label_values({node}, ray_io_cluster)", "Ray clusters of KubeRay."),
        variable("run", f"label_values({steps}{{{FILTER}}}, run)", "The last two parts of run_dir.", multi=True),
    ]


def dashboard_json(dashboard: Dashboard) -> dict[str, Any]:
    panels: list[dict[str, Any]] = []
    fixed = {panel.number for row in dashboard.rows.values() for panel in row}
    numbers = (number for number in range(1, 1000) if number not in fixed)
    y = 0
    for title, row in dashboard.rows.items():
        place = {"h": ROW_HEIGHT, "w": ROW_WIDTH, "x": 0, "y": y}
        panels.append({"id": next(numbers), "type": "row", "title": title, "collapsed": False, "panels": []})
        panels[-1]["gridPos"] = place
        y += ROW_HEIGHT
        x = height = 0
        for panel in row:
            width, height = (WIDTH, HEIGHT) if panel.kind == "timeseries" else (WIDTH // 2, HEIGHT // 2)
            if x + width > ROW_WIDTH:
                x, y = 0, y + height
            number = next(numbers) if panel.number is None else panel.number
            panels.append(panel_json(panel, number, {"h": height, "w": width, "x": x, "y": y}))
            x += width
        y += height
    link = {"type": "dashboards", "tags": ["diffrl"], "title": "diffrl", "asDropdown": False}
    return {
        "uid": f"diffrl-{dashboard.name}",
        "title": f"diffrl: {dashboard.name}",
        "tags": ["diffrl"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,  # one cross-hair in all panels
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "links": [{**link, "includeVars": True, "keepTime": True, "targetBlank": False, "icon": "external link"}],
        "templating": {"list": variables()},
        "annotations": {"list": []},
        "panels": panels,
    }


RULE_HEADER = "# Made of rules.yaml by `python -m actors.dashboards`.\n"


def prometheus_rule(rules: Mapping[str, Any]) -> dict[str, Any]:
    """As the Prometheus operator takes them."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "diffrl", "namespace": "diffrl"},
        "spec": dict(rules),
    }


def files() -> dict[Path, str]:
    """What is committed, by its path."""
    made = {
        MONITORING / "dashboards" / f"{dashboard.name}.json": json.dumps(dashboard_json(dashboard), indent=1) + "\n"
        for dashboard in DASHBOARDS
    }
    rules = yaml.safe_load((MONITORING / "rules.yaml").read_text())
    as_yaml = yaml.safe_dump(prometheus_rule(rules), sort_keys=False, width=120)
    return {**made, MONITORING / "prometheusrule.yaml": RULE_HEADER + as_yaml}


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text)
