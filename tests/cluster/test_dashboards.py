"""The dashboards, alerts and monitors of cluster/monitoring: what is committed is what is made, all of it is about metrics that
there are, and Grafana, Ray and Kubernetes can read it."""

import json
import re
import subprocess
from typing import Any

import pytest
import yaml
from ray.dashboard.modules.metrics import grafana_dashboard_factory, metrics_head

from actors.dashboards import DASHBOARDS, MONITORING, files, in_prometheus, words
from actors.dashboards import Panel as PanelOf
from actors.dashboards import unit_of as unit
from diffrl.metrics import METRICS, STEP_ENDED_AT, STEPS
from sandbox.judge import metrics as pod_metrics
from sandbox.judge.metrics import render
from tests.cluster.expressions import committed, metrics_in, of_panels, panels, rules, tool
from tests.cluster.manifests import built, the

NAMES = [dashboard.name for dashboard in DASHBOARDS]
OURS = {in_prometheus(metric) for metric in (*METRICS, STEPS, STEP_ENDED_AT)}
# Of Ray; tests/cluster/test_monitoring.py sees them come.
RAYS = {
    *("ray_node_cpu_utilization", "ray_node_mem_used", "ray_node_mem_total", "ray_object_store_memory"),
    *("ray_node_gpus_utilization", "ray_node_gram_used", "ray_node_gram_available"),
    *("autoscaler_active_nodes", "autoscaler_pending_nodes", "autoscaler_recently_failed_nodes"),
}
OF_PODS = set(re.findall(r"^(\w+) ", render(dict.fromkeys(pod_metrics._SERIES, 0)), flags=re.MULTILINE))
OVERLAY = "overlays/monitoring"
Json = dict[str, Any]


def test_what_is_committed_is_what_is_made() -> None:
    for path, text in files().items():
        assert path.read_text() == text, f"{path.name}: run `python -m actors.dashboards`"
    assert {path.stem for path in (MONITORING / "dashboards").iterdir()} == set(NAMES)
    assert NAMES == ["pipeline", "rollouts", "rewards", "learner"]


def test_every_expression_is_about_metrics_that_there_are() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    asked = [*of_panels(), *((rule.get("record", rule.get("alert")), rule["expr"]) for rule in rules())]
    assert len(asked) > 100
    for where, expression in asked:
        assert metrics_in(expression) and metrics_in(expression) <= OURS | RAYS | OF_PODS | recorded, where
    assert metrics_in('rate(ray_diffrl_rewards{run="ray_diffrl_x"}[5m])') == {"ray_diffrl_rewards"}  # a typo is seen


def test_every_metric_is_shown() -> None:
    shown = set.union(*(metrics_in(expression) for _, expression in of_panels()))
    assert shown >= OURS, OURS - shown


@pytest.mark.parametrize("name", NAMES)
def test_grafana_can_read_it(name: str) -> None:
    dashboard = committed(name)
    assert re.fullmatch(r"[\w-]{1,40}", dashboard["uid"]) and dashboard["uid"] == f"diffrl-{name}"
    assert dashboard["title"] and dashboard["schemaVersion"] >= 36 and dashboard["tags"] == ["diffrl"]
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(numbers)) == len(numbers)
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert cells and max(x for x, _ in cells) < 24 and not cells & taken, panel["title"]
        taken |= cells
    for panel in panels(dashboard):
        assert (
            panel["type"] in ("timeseries", "stat") and panel["title"] and panel["datasource"]["uid"] == "${datasource}"
        )
        assert panel["fieldConfig"]["defaults"]["unit"]
        letters, legends = ([target[key] for target in panel["targets"]] for key in ("refId", "legendFormat"))
        assert len(set(letters)) == len(set(legends)) == len(letters) and all(legends), panel["title"]
        assert len(panel["description"].split("\n\n")) == len(panel["targets"])


def test_words_and_units_are_those_of_the_metrics() -> None:
    described = {panel["title"]: panel for panel in panels(committed("pipeline"))}
    step = described["A step by phase"]
    assert "`time/learner`: the update (s)" in step["description"]
    assert [t["legendFormat"] for t in step["targets"]][:2] == ["{{run}} rollouts", "{{run}} record"]
    calls = described["A call about a group"]["targets"]
    assert calls[0]["legendFormat"] == "{{run}} {{role}} p50 s" and "max by (run, role)" in calls[0]["expr"]
    assert words("loss/kl", whole=True) == "loss kl" and words("reward/part/{part}") == "part"
    assert unit(PanelOf(title="", shows=("memory/{role}_mb",))) == ("mbytes", "")
    assert unit(PanelOf(title="", shows=("group/mixed_frac",))) == ("percentunit", "groups")
    assert unit(PanelOf(title="", shows=("rollout/tokens",))) == ("short", "tokens in 5m")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Ray leaves a file open
def test_the_ray_dashboard_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Metrics page embeds one dashboard, whose uid it takes from a variable; its Overview two panels of it. It passes its
    own names for variables on."""
    (head,) = (c for c in the("RayCluster", OVERLAY)["spec"]["headGroupSpec"]["template"]["spec"]["containers"])
    env = {variable["name"]: variable["value"] for variable in head["env"]}
    known = {value for name, value in vars(metrics_head).items() if name.endswith("_ENV_VAR")}
    template = grafana_dashboard_factory.GRAFANA_DASHBOARD_UID_OVERRIDE_ENV_VAR_TEMPLATE
    name = template.format(name=grafana_dashboard_factory.default_dashboard_config.name)
    about = {key for key in env if key.startswith(("RAY_GRAFANA", "RAY_PROMETHEUS"))}
    assert about == {"RAY_PROMETHEUS_HOST", "RAY_GRAFANA_HOST", "RAY_GRAFANA_IFRAME_HOST", name} <= known | {name}
    monkeypatch.setenv(name, env[name])
    raw, uid = grafana_dashboard_factory.generate_default_grafana_dashboard()
    ray, ours = json.loads(raw), committed("pipeline")
    assert uid == ours["uid"]
    titles = {panel["id"]: panel["title"] for panel in ours["panels"]}
    rays = {panel["id"]: panel["title"] for row in ray["panels"] for panel in [row, *row.get("panels", [])]}
    for number in (24, 41):
        assert titles[number] == rays[number]
    for dashboard in map(committed, NAMES):
        variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
        assert set(variables) == {"datasource", "SessionName", "Cluster", "run"}
        assert set(variables) - {"run"} <= {variable["name"] for variable in ray["templating"]["list"]}
        assert variables["datasource"]["query"] == "prometheus" and variables["run"]["multi"]


def test_rules_say_what_to_do() -> None:
    alerts = {rule["alert"]: rule for rule in rules() if "alert" in rule}
    assert set(alerts) == {
        *("DiffrlStalled", "DiffrlInfrastructureErrors", "DiffrlWorkersLost", "DiffrlWeightMismatch"),
        *("DiffrlNodeMemory", "DiffrlMemoryGrows", "DiffrlRewardCollapse", "DiffrlZeroVarianceGroups"),
    }
    for name, rule in alerts.items():
        assert metrics_in(rule["expr"]) <= {other["record"] for other in rules() if "record" in other}, name
        assert rule["labels"]["severity"] in ("critical", "warning"), name
        assert "{{ $value" in rule["annotations"]["summary"] and len(rule["annotations"]["description"]) > 150, name
    caused = re.findall(r'alertname="(\w+)", alertstate="firing"', (MONITORING / "rules_test.yaml").read_text())
    assert set(caused) == set(alerts)


@pytest.mark.parametrize("command", ["check", "test"])
def test_promtool_takes_the_rules_and_every_alert_fires(command: str) -> None:
    file = {"check": "rules.yaml", "test": "rules_test.yaml"}[command]
    made = subprocess.run([tool("promtool"), command, "rules", MONITORING / file], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr


def test_the_operator_gets_the_same_rules() -> None:
    rule = the("PrometheusRule", OVERLAY)
    assert rule["spec"] == yaml.safe_load((MONITORING / "rules.yaml").read_text())
    assert (rule["apiVersion"], set(rule), set(rule["spec"])) == ("monitoring.coreos.com/v1", KEYS, {"groups"})


def test_grafanas_sidecar_gets_the_dashboards() -> None:
    found = the("ConfigMap", OVERLAY)
    values = yaml.safe_load((MONITORING / "stack-values.yaml").read_text())["grafana"]["sidecar"]["dashboards"]
    assert found["metadata"]["labels"] == {values["label"]: values["labelValue"]}
    assert {name: json.loads(text) for name, text in found["data"].items()} == {
        f"diffrl-{name}.json": committed(name) for name in NAMES
    }
    assert len(json.dumps(found)) < 200_000  # `kubectl apply` keeps a copy of 256 KiB at most in an annotation


KEYS = {"apiVersion", "kind", "metadata", "spec"}
# Of the operator's API reference, as far as it is used here; its CRDs are not among our schemas.
MONITOR, ENDPOINT = {"selector", "podMetricsEndpoints"}, {"port", "interval", "relabelings"}


def wrong_with_monitor(monitor: Json) -> list[str]:
    spec = monitor["spec"]
    unknown = [*(set(monitor) - KEYS), *(set(spec) - MONITOR), *(set(spec["selector"]) - {"matchLabels"})]
    for endpoint in spec["podMetricsEndpoints"]:
        unknown += set(endpoint) - ENDPOINT
        if not re.fullmatch(r"\d+s", endpoint["interval"]):
            unknown.append(f"interval: {endpoint['interval']}")
        for relabeling in endpoint.get("relabelings", []):
            unknown += set(relabeling) - {"sourceLabels", "targetLabel"}
    return unknown


def test_monitors_find_their_pods_and_ports() -> None:
    monitors = {m["metadata"]["name"]: m for m in built(OVERLAY) if m["kind"] == "PodMonitor"}
    assert set(monitors) == {"ray-head", "ray-workers", "sandbox"}
    for monitor in monitors.values():
        assert wrong_with_monitor(monitor) == [] and monitor["metadata"]["namespace"] == "diffrl"
    ports = {name: [e["port"] for e in m["spec"]["podMetricsEndpoints"]] for name, m in monitors.items()}
    labels = {name: m["spec"]["selector"]["matchLabels"] for name, m in monitors.items()}
    cluster = the("RayCluster", OVERLAY)["spec"]
    head = cluster["headGroupSpec"]["template"]["spec"]["containers"][0]
    named = {port["name"]: port["containerPort"] for port in head["ports"]}
    assert set(ports["ray-head"]) <= set(named) and named["metrics"] == 8080  # KubeRay's --metrics-export-port
    assert (labels["ray-head"], labels["ray-workers"]) == ({"ray.io/node-type": "head"}, {"ray.io/node-type": "worker"})
    assert ports["ray-workers"] == ["metrics"]  # KubeRay adds it where no container has it
    assert not [g for g in cluster["workerGroupSpecs"] if "ports" in g["template"]["spec"]["containers"][0]]
    template = the("Deployment", OVERLAY)["spec"]["template"]
    assert labels["sandbox"].items() <= template["metadata"]["labels"].items()
    assert ports["sandbox"] == ["metrics"] and "metrics" in {
        port["name"] for port in template["spec"]["containers"][0]["ports"]
    }
    ray = [e for name in ("ray-head", "ray-workers") for e in monitors[name]["spec"]["podMetricsEndpoints"]]
    assert {r["targetLabel"] for e in ray for r in e["relabelings"]} == {"ray_io_cluster"}


def test_a_wrong_monitor_is_found() -> None:
    monitor = next(m for m in built(OVERLAY) if m["kind"] == "PodMonitor")
    planted = json.loads(json.dumps(monitor))
    planted["spec"]["podMetricEndpoints"] = []
    planted["spec"]["podMetricsEndpoints"][0]["intervall"] = "10s"
    assert sorted(wrong_with_monitor(planted)) == ["intervall", "podMetricEndpoints"]
