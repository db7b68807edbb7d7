"""Every manifest of cluster/ by schema, by the operator's rules, by the Pod Security standards and by Ray's own reading."""

import copy
import functools
import re
import shlex
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr as ray_reads
from ray.scripts.scripts import cli as ray_cli

from tests.cluster import pod_security
from tests.cluster.manifests import (
    BUILT,
    CLUSTER,
    GPU,
    NIGHTLY,
    ROOT,
    TALK,
    TRAIN,
    built,
    groups,
    pods,
    ray_clusters,
    the,
    wrong_with,
)
from tests.cluster.operator_rules import AUTOSCALER_V2
from tests.cluster.schemas import schemas

# No part of a build: Helm values, a template, and what prometheusrule.yaml is made of and tested with.
OF_USERS = {
    *("adapter-values.yaml", "sandbox-token.example.yaml", "monitoring/stack-values.yaml"),
    *("monitoring/rules.yaml", "monitoring/rules_test.yaml"),
}
GI = 2**30


@pytest.mark.parametrize("name", BUILT)
def test_the_api_server_and_the_operator_take_it(name: str) -> None:
    for manifest in built(name):
        assert wrong_with(manifest) == [], (manifest["kind"], manifest["metadata"]["name"])


def test_no_file_is_left_out() -> None:
    used = set()
    for name in BUILT:
        folder = CLUSTER / name
        kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
        listed = [*kustomization.get("resources", []), *kustomization.get("patchesStrategicMerge", [])]
        listed += [patch["path"] for patch in kustomization.get("patchesJson6902", [])]
        used |= {folder / "kustomization.yaml", *(folder / file for file in listed)}
    assert used == set(CLUSTER.rglob("*.yaml")) - {CLUSTER / name for name in OF_USERS}
    for name in (name for name in BUILT if name.startswith(("overlays/", "jobs/"))):
        assert f"{name}`" in (CLUSTER / "README.md").read_text(), name


def test_the_token_is_a_template() -> None:
    """No credential in the repository: the supervisor refuses an empty token."""
    secret = yaml.safe_load((CLUSTER / "sandbox-token.example.yaml").read_text())
    assert wrong_with(secret) == [] and secret["stringData"] == {"token": ""}
    assert not [m for name in BUILT for m in built(name) if m["kind"] == "Secret"]


GROUP = "spec.workerGroupSpecs.0"
RAY, HEAD = f"{GROUP}.template.spec.containers.0", "spec.headGroupSpec.template.spec"
OWN, SELECTOR = "spec.rayClusterSpec", {"ray.io/cluster": "diffrl"}
RULES = "spec.deletionStrategy.deletionRules"
# Where, which field, its value (None: away), and what must be said of it.
PLANTED = [
    (GPU, "RayCluster", "spec.rayVersions", "2.60.0", "'rayVersions' was unexpected"),
    (GPU, "RayCluster", f"{GROUP}.maxReplica", 1, "'maxReplica' was unexpected"),
    (GPU, "RayCluster", f"{RAY}.imagePulPolicy", "Always", "'imagePulPolicy' was unexpected"),
    (GPU, "RayCluster", f"{GROUP}.maxReplicas", "1", "is not of type 'integer'"),
    (GPU, "RayCluster", f"{GROUP}.labels.diffrl/group", 1, "is not of type 'string'"),
    (GPU, "RayCluster", "spec.headGroupSpec.template", None, "'template' is a required property"),
    (GPU, "RayCluster", "spec.authOptions.mode", "tokens", "is not one of ['disabled', 'token']"),
    (GPU, "RayCluster", "spec.autoscalerOptions.version", "v3", "is not one of ['v1', 'v2']"),
    (GPU, "RayCluster", "metadata.label", {}, "'label' was unexpected"),
    (GPU, "RayCluster", f"{RAY}.env.1.name", "RAY_USAGE_STATS_ENABLED", "is there twice"),
    (GPU, "RayCluster", f"{GROUP}.template.spec.restartPolicy", "Always", "learner: restartPolicy with autoscaler v2"),
    (GPU, "RayCluster", f"{HEAD}.restartPolicy", "OnFailure", "head: restartPolicy"),
    (GPU, "RayCluster", "spec.headGroupSpec.resources", {"CPU": "0"}, "head: resources also in rayStartParams"),
    (GPU, "RayCluster", f"{GROUP}.rayStartParams", {"labels": "a=b"}, "learner: labels in rayStartParams"),
    (GPU, "RayCluster", f"{GROUP}.minReplicas", 2, "learner: minReplicas <= replicas <= maxReplicas"),
    (GPU, "RayCluster", f"{GROUP}.groupName", "rollout", "groups of one name"),
    (GPU, "RayCluster", f"{GROUP}.suspend", True, "learner: suspended with autoscaling"),
    (GPU, "RayCluster", "spec.rayVersion", None, "authOptions: needs a rayVersion"),
    (GPU, "RayCluster", "spec.rayVersion", "2.51.1", "authOptions: needs a rayVersion"),
    (GPU, "RayCluster", f"{HEAD}.containers.0.env.0.name", AUTOSCALER_V2, f"{AUTOSCALER_V2} beside"),
    (GPU, "RayCluster", "metadata.name", "8gpus", "metadata.name"),
    (TRAIN, "RayJob", "metadata.name", "t" * 48, "metadata.name"),
    (TRAIN, "RayJob", "spec.submissionMode", "SideCarMode", "submissionMode: SideCarMode"),
    (TRAIN, "RayJob", OWN, None, "neither rayClusterSpec nor clusterSelector"),
    (TRAIN, "RayJob", "spec.clusterSelector", SELECTOR, "SidecarMode: no clusterSelector"),
    (TRAIN, "RayJob", f"{OWN}.headGroupSpec.template.spec.restartPolicy", "Always", "SidecarMode: restartPolicy"),
    (TRAIN, "RayJob", "spec.shutdownAfterJobFinishes", True, "deletionRules: not with shutdownAfterJobFinishes"),
    (TRAIN, "RayJob", "spec.ttlSecondsAfterFinished", 60, "ttlSecondsAfterFinished: needs shutdown"),
    (TRAIN, "RayJob", "spec.suspend", True, "suspend: needs shutdownAfterJobFinishes"),
    (TRAIN, "RayJob", "spec.entrypoint", None, "entrypoint: of every mode but"),
    (TRAIN, "RayJob", "spec.preRunningDeadlineSeconds", 0, "less than the minimum of 1"),
    (TRAIN, "RayJob", f"{RULES}.0.policy", "DeleteWorkers", "DeleteWorkers: not with autoscaling"),
    (TRAIN, "RayJob", f"{RULES}.0.policy", "DeleteAll", "is not one of"),
    (TRAIN, "RayJob", f"{RULES}.0.condition.ttlSeconds", 10**6, "must grow from workers to cluster to job"),
    (TRAIN, "RayJob", f"{RULES}.1.condition.jobStatus", "SUCCEEDED", "DeleteCluster twice for SUCCEEDED"),
    (TRAIN, "RayJob", f"{RULES}.0.condition.jobDeploymentStatus", "Failed", "either jobStatus or jobDeploymentStatus"),
    (TRAIN, "RayJob", f"{OWN}.workerGroupSpecs.1.replicas", 5, "rollout: minReplicas <= replicas"),
    (TALK, "RayJob", "spec.backoffLimit", 1, "backoffLimit: not with clusterSelector or InteractiveMode"),
    (TALK, "RayJob", "spec.entrypoint", "true", "entrypoint: of every mode but"),
    (TALK, "RayJob", "spec.submissionMode", None, "entrypoint: of every mode but"),
    (NIGHTLY, "RayCronJob", "spec.schedule", "every night", "schedule: every night"),
    (NIGHTLY, "RayCronJob", "spec.jobTemplate", None, "'jobTemplate' is a required property"),
    (NIGHTLY, "RayCronJob", "spec.jobTemplate.rayClusterSpec.authOptions", {"x": 1}, "'x' was unexpected"),
    (NIGHTLY, "RayCronJob", "spec.jobTemplate.submissionMode", "Sidecar", "submissionMode: Sidecar"),
    (GPU, "Deployment", "spec.template.spec.terminationGracePeriod", 1, "'terminationGracePeriod' was unexpected"),
    (GPU, "Deployment", "spec.selector", None, "'selector' is a required property"),
    (GPU, "HorizontalPodAutoscaler", "spec.metrics.0.external.target.averageValu", "3", "'averageValu' was unexpected"),
    (GPU, "NetworkPolicy", "spec.egres", [], "'egres' was unexpected"),
    ("overlays/gvisor", "RuntimeClass", "handler", None, "'handler' is a required property"),
]


@pytest.mark.parametrize(("name", "kind", "field", "value", "said"), PLANTED)
def test_a_planted_error_is_found(name: str, kind: str, field: str, value: Any, said: str) -> None:
    manifest = the(kind, name)
    *parents, last = (int(key) if key.isdecimal() else key for key in re.findall(r"[^.]+", field))
    node: Any = functools.reduce(lambda node, key: node[key], parents, manifest)
    if value is None:
        del node[last]
    else:
        node[last] = value
    assert any(said in line for line in wrong_with(manifest)), wrong_with(manifest)


def test_a_job_on_a_cluster_that_is_there_takes_no_retries() -> None:
    manifest = the("RayJob", TALK)
    del manifest["spec"]["rayClusterSpec"]
    manifest["spec"] |= {"clusterSelector": SELECTOR, "submissionMode": "HTTPMode", "entrypoint": "true"}
    assert wrong_with(manifest) == []
    manifest["spec"]["backoffLimit"] = 1
    assert wrong_with(manifest) == ["backoffLimit: not with clusterSelector or InteractiveMode"]


def test_nulls_are_no_values_and_defaults_are_there() -> None:
    job = the("RayJob", TRAIN)
    job["spec"] |= {"suspend": None, "submissionMode": None}
    assert schemas().check(job) == []
    schema = schemas().kinds["ray.io/v1", "RayJob"]
    completed = schemas().complete(job, schema)["spec"]
    assert "suspend" not in completed and completed["submissionMode"] == "K8sJobMode"
    assert completed["rayClusterSpec"]["workerGroupSpecs"][0]["numOfHosts"] == 1


SMALL = {"CPU": 2, "memory": 6 * GI}
LEARNER, ROLLOUT = {"CPU": 32, "GPU": 4, "memory": 256 * GI}, {"CPU": 8, "GPU": 1, "memory": 64 * GI}
REWARD = {"CPU": 4, "memory": 8 * GI}
ON_CPUS = {"learner": (SMALL, 0, 1), "rollout": (SMALL, 0, 2), "reward": (SMALL, 0, 2)}
ON_GPUS = {"learner": (LEARNER, 0, 1), "rollout": (ROLLOUT, 0, 4), "reward": (REWARD, 0, 8)}
AT_ONCE = {"learner": (LEARNER, 1, 1), "rollout": (ROLLOUT, 4, 4), "reward": (REWARD, 1, 8)}
EXPECTED = {
    **dict.fromkeys(("base", "overlays/dev"), ON_CPUS),
    **dict.fromkeys((GPU, "overlays/gvisor", "overlays/air-gapped", "overlays/gcs-ft", "overlays/keda"), ON_GPUS),
    **dict.fromkeys(("overlays/monitoring", "overlays/restricted", TALK), ON_GPUS),
    **dict.fromkeys((TRAIN, "overlays/kueue", "overlays/object-store"), AT_ONCE),
    "overlays/spot": ON_GPUS | {"rollout-spot": (ROLLOUT, 0, 8)},
    NIGHTLY: {"rollout": (ROLLOUT, 1, 1)},
}


def test_every_folder_but_one_has_a_ray_cluster() -> None:
    assert {*EXPECTED, "monitoring"} == set(BUILT)


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_ray_reads_the_groups_as_they_are_meant(name: str) -> None:
    ((manifest, spec),) = ray_clusters(name)
    read = ray_reads({"metadata": manifest["metadata"], "spec": spec})
    types = read["available_node_types"]
    head = types.pop(read["head_node_type"])
    assert (
        head["resources"].items() >= {"CPU": 0}.items() and "GPU" not in head["resources"] and head["max_workers"] == 0
    )
    assert {group: (t["resources"], t["min_workers"], t["max_workers"]) for group, t in types.items()} == EXPECTED[name]
    assert {group: t["labels"] for group, t in types.items()} == {
        group: {"diffrl/group": group.removesuffix("-spot")} for group in EXPECTED[name]
    }
    assert read["idle_timeout_minutes"] == (5 if "autoscalerOptions" in spec else 1)


def test_what_reads_wrong_is_not_what_is_meant() -> None:
    """Ray falls back on requests, and then says something else."""
    manifest = the("RayCluster", GPU)
    resources = manifest["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]
    resources["limits"]["cpu"] = "16"
    assert ray_reads(manifest)["available_node_types"]["learner"]["resources"] == LEARNER | {"CPU": 16}


def pinned(package: str) -> str:
    (version,) = re.findall(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    return version


@pytest.mark.parametrize("name", BUILT)
def test_ray_is_the_pinned_one_and_asks_for_a_token(name: str) -> None:
    for _, spec in ray_clusters(name):
        assert spec["rayVersion"] == pinned("ray")
        assert spec["authOptions"] == {"mode": "token"}
        assert (
            len({container["image"] for group in groups(spec) for container in group["template"]["spec"]["containers"]})
            == 1
        )


@pytest.mark.parametrize("name", BUILT)
def test_pods_have_few_rights(name: str) -> None:
    for group, pod_spec in pods(name):
        strict = group != "sandbox" or name == "overlays/restricted"
        assert list((pod_security.restricted if strict else pod_security.baseline)(pod_spec)) == [], group
        assert pod_spec.get("automountServiceAccountToken") is (None if group == "head" else False)
    enforced = [m["metadata"]["labels"] for m in built(name) if m["kind"] == "Namespace"]
    assert enforced in (
        [],
        [{"pod-security.kubernetes.io/enforce": "restricted" if "restricted" in name else "baseline"}],
    )


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda pod: pod.update(hostNetwork=True), "hostNetwork"),
        (lambda pod: pod["volumes"].append({"name": "x", "hostPath": {"path": "/var/run/docker.sock"}}), "hostPath"),
        (lambda pod: pod["containers"][0]["securityContext"].update(privileged=True), "privileged"),
        (
            lambda pod: pod["containers"][0]["securityContext"]["capabilities"]["add"].append("SYS_ADMIN"),
            "capabilities",
        ),
        (lambda pod: pod["containers"][0]["securityContext"].update(procMount="Unmasked"), "procMount"),
        (lambda pod: pod["securityContext"].update(seccompProfile={"type": "Unconfined"}), "seccompProfile"),
        (lambda pod: pod["containers"][0]["ports"][0].update(hostPort=7010), "hostPort"),
    ],
)
def test_a_right_too_many_is_found(change: Change, said: str) -> None:
    spec = the("Deployment", "base")["spec"]["template"]["spec"]
    assert list(pod_security.baseline(spec)) == []
    assert {"capabilities", "runAsNonRoot", "runAsUser"} == set(pod_security.restricted(spec))
    change(spec)
    assert any(line.startswith(said) for line in pod_security.baseline(spec))


@pytest.mark.parametrize("name", BUILT)
def test_ray_pods_have_the_shared_files_and_the_token(name: str) -> None:
    (claim,) = (m["metadata"]["name"] for m in built("base") if m["kind"] == "PersistentVolumeClaim")
    token = yaml.safe_load((CLUSTER / "sandbox-token.example.yaml").read_text())["metadata"]["name"]
    for _, spec in ray_clusters(name):
        for pod_spec in (group["template"]["spec"] for group in groups(spec)):
            mounts = {mount["mountPath"]: mount["name"] for mount in pod_spec["containers"][0]["volumeMounts"]}
            volumes = {volume.pop("name"): volume for volume in copy.deepcopy(pod_spec["volumes"])}
            assert volumes[mounts["/shared"]] == {"persistentVolumeClaim": {"claimName": claim}}
            # Its mode: for the group that Kubernetes gives such files.
            assert volumes[mounts["/run/diffrl"]] == {"secret": {"secretName": token, "defaultMode": 0o440}}
            assert pod_spec["securityContext"]["fsGroup"] == pod_spec["securityContext"]["runAsUser"]


def test_a_spot_node_is_drained_before_it_is_gone() -> None:
    ((_, spec),) = ray_clusters("overlays/spot")
    (spot,) = (group["template"]["spec"] for group in spec["workerGroupSpecs"] if group["groupName"] == "rollout-spot")
    shell, flag, script = spot["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    drain, wait, stop = (shlex.split(command) for command in script.split(";"))
    assert (shell, flag, wait[0], stop) == ("sh", "-c", "sleep", ["ray", "stop"])
    asked = ray_cli.commands["drain-node"].make_context("drain-node", drain[2:]).params
    assert asked["node_id"] is None and asked["reason"] == "DRAIN_NODE_REASON_PREEMPTION"  # this node
    assert int(wait[1]) < asked["deadline_remaining_seconds"] < spot["terminationGracePeriodSeconds"] < 30


def test_the_trainer_image_is_the_pods_image() -> None:
    lines = (CLUSTER / "Dockerfile.trainer").read_text().splitlines()
    (base,) = (line.partition("=")[2] for line in lines if line.startswith("ARG BASE="))
    assert re.fullmatch(r"[\w./-]+:\d[\w.-]+", base)  # a version, not latest
    (user,) = (line.split()[1] for line in lines if line.startswith("USER "))
    assert any("-c constraints.txt" in line for line in lines)
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)
    assert version is not None
    for name in BUILT:
        for group, spec in pods(name):
            image, _, tag = spec["containers"][0].get("image", "").rpartition(":")
            if group == "sandbox":
                assert image.endswith("diffrl-sandbox") and tag == "base"
            elif image:
                assert image.endswith("diffrl-trainer") and tag == version[1]
                assert spec["securityContext"]["runAsUser"] == int(user)


def test_the_readme_names_what_there_is() -> None:
    text = (CLUSTER / "README.md").read_text()
    first = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)[0]
    commands = [line for line in first.replace("\\\n", "").splitlines() if line and not line.startswith("#")]
    assert len(commands) == 10
    for path in re.findall(r"(?:-k|-f) (cluster/\S+|sandbox/\S+)", text):
        assert (ROOT / path).exists(), path
    applied = set(re.findall(r"-k cluster/(\S+)", text))
    assert applied and applied <= set(BUILT)
