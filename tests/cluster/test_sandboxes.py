"""The sandbox pods of cluster/ against the supervisor that runs in them, and the metric that they scale by."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sandbox import container, pod
from sandbox.judge import metrics, supervisor
from sandbox.types import Limits
from tests.cluster.manifests import BUILT, CLUSTER, built, quantity, the

SANDBOXED = [
    name
    for name in BUILT
    if name == "base" or (name.startswith("overlays/") and name not in ("overlays/kueue", "overlays/object-store"))
]


def pod_of(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The template of the sandbox pods, and its only container."""
    template = the("Deployment", name)["spec"]["template"]
    (judge,) = template["spec"]["containers"]
    return template, judge


@pytest.mark.parametrize("name", SANDBOXED)
def test_the_supervisor_finds_its_token_and_its_scratch(name: str) -> None:
    template, judge = pod_of(name)
    mounts = {mount["mountPath"]: mount["name"] for mount in judge["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
    example = yaml.safe_load((CLUSTER / "sandbox-token.example.yaml").read_text())
    (variable,) = judge["env"]
    if name == "overlays/restricted":  # programs could read a file
        secret = variable["valueFrom"]["secretKeyRef"]
        assert variable["name"] == supervisor.TOKEN and secret["key"] in example["stringData"]
        assert secret["name"] == example["metadata"]["name"]
        assert list(mounts) == ["/scratch"] and list(volumes) == ["scratch"]
        assert "add" not in judge["securityContext"]["capabilities"]
    else:
        token_file = Path(variable["value"])
        secret = volumes[mounts[str(token_file.parent)]]["secret"]
        assert variable["name"] == supervisor.TOKEN_FILE and token_file.name in example["stringData"]
        assert secret["secretName"] == example["metadata"]["name"]
        assert judge["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": container.CAPABILITIES}
        assert secret["defaultMode"] == 0o400  # for root, so not for programs
    assert volumes[mounts["/scratch"]]["emptyDir"]["medium"] == "Memory"
    assert judge["securityContext"]["readOnlyRootFilesystem"] is True
    assert judge["terminationMessagePath"].startswith("/root/")  # where nobody but root may go


def test_the_restricted_pods_are_some_in_which_the_judge_starts() -> None:
    template, judge = pod_of("overlays/restricted")
    context = judge["securityContext"]
    assert supervisor.parse(judge["args"]).slots == 1
    assert (
        context["runAsUser"] == context["runAsGroup"] == 10002 and template["spec"]["securityContext"]["runAsNonRoot"]
    )
    assert not template["spec"].get("shareProcessNamespace")  # the judge is the first process


@pytest.mark.parametrize("name", SANDBOXED)
def test_a_pod_has_room_for_its_slots_and_time_to_drain(name: str) -> None:
    template, judge = pod_of(name)
    limits, num_tests = Limits(), 100
    (scratch,) = (volume["emptyDir"] for volume in template["spec"]["volumes"] if "emptyDir" in volume)
    of_slot = 2 * limits.memory_mb * 2**20  # the program's process and the tests'
    needed = supervisor.parse(judge["args"]).slots * of_slot + quantity(scratch["sizeLimit"])
    assert quantity(judge["resources"]["limits"]["memory"]) >= needed
    longest_s = 2 * limits.wall_s + limits.cpu_s * (num_tests + 1)
    drain_s = template["spec"]["terminationGracePeriodSeconds"] - judge["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert drain_s > longest_s
    assert "replicas" not in the("Deployment", name)["spec"]  # the autoscaler's


@pytest.mark.parametrize("name", SANDBOXED)
def test_pods_are_reached_on_their_ports_and_reach_nothing(name: str) -> None:
    template, judge = pod_of(name)
    options, labels = supervisor.parse(judge["args"]), template["metadata"]["labels"]
    ports = {port["name"]: port["containerPort"] for port in judge["ports"]}
    assert ports == {"judge": pod.PORT, "metrics": pod.METRICS_PORT}
    assert options.listen == f"0.0.0.0:{pod.PORT}" and options.metrics == f"0.0.0.0:{pod.METRICS_PORT}"
    assert template["metadata"]["annotations"]["prometheus.io/port"] == str(pod.METRICS_PORT)
    services = [m["spec"] for m in built(name) if m["kind"] == "Service"]
    assert [service.get("clusterIP") for service in services] == ["None"]  # its name leads to the pods themselves
    for service in services:
        assert service["selector"].items() <= labels.items()
        assert [(ports[port["targetPort"]], port["port"]) for port in service["ports"]] == [(pod.PORT, pod.PORT)]
    (policy,) = (m["spec"] for m in built(name) if m["kind"] == "NetworkPolicy" and m["metadata"]["name"] == "sandbox")
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"} and policy["egress"] == []
    assert [rule["ports"] for rule in policy["ingress"]] == [[{"port": port}] for port in ports.values()]
    assert all(rule["from"] for rule in policy["ingress"])


ADAPTER = yaml.safe_load((CLUSTER / "adapter-values.yaml").read_text())


@pytest.mark.parametrize("name", SANDBOXED)
def test_sandbox_pods_follow_a_metric_that_there_is(name: str) -> None:
    (rule,) = ADAPTER["rules"]["external"]
    slots = supervisor.parse(pod_of(name)[1]["args"]).slots
    exported = metrics.render(dict.fromkeys(metrics._SERIES, 0))
    if name == "overlays/keda":
        scaler = the("ScaledObject", name)["spec"]
        (trigger,) = (trigger["metadata"] for trigger in scaler["triggers"])
        queries, target = [trigger["query"]], quantity(trigger["threshold"])
        assert not [m for m in built(name) if m["kind"] == "HorizontalPodAutoscaler"]  # two would fight
        assert scaler["scaleTargetRef"]["name"] == "sandbox" and scaler["minReplicaCount"] < scaler["maxReplicaCount"]
    else:
        scaler = the("HorizontalPodAutoscaler", name)["spec"]
        assert scaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "sandbox"}
        assert scaler["minReplicas"] < scaler["maxReplicas"]
        (metric,) = scaler["metrics"]
        if name == "overlays/dev":
            assert metric["resource"]["name"] == "cpu"
            return
        assert metric["external"]["metric"]["name"] == rule["name"]["as"]
        queries = [rule["metricsQuery"], rule["seriesQuery"]]
        target = quantity(metric["external"]["target"]["averageValue"])
    assert slots / 2 <= target <= slots  # of a pod: neither idle nor full
    for series in re.findall(r"diffrl_sandbox_\w+", " ".join(queries)):
        assert f"# TYPE {series} gauge" in exported
