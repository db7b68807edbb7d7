"""Every manifest of cluster/, as `kubectl kustomize` builds it: by schema, by the operator's rules, by Ray's own reading, and
against the code and the configs that it names."""

import copy
import functools
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr as ray_reads
from ray.scripts.scripts import cli as ray_cli

from actors.cli import app
from diffrl.config import RLConfig
from diffrl.config_file import load_config
from sandbox import container, pod
from sandbox.judge import metrics, supervisor
from sandbox.types import Limits
from tests.cluster import operator_rules, pod_security
from tests.cluster.schemas import schemas
from tests.container_engine import unavailable

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
BUILT = sorted(str(path.parent.relative_to(CLUSTER)) for path in CLUSTER.rglob("kustomization.yaml"))
OF_USERS = {"adapter-values.yaml", "sandbox-token.example.yaml"}  # no part of a build: Helm values, a template
# Kinds of other projects, whose schemas are not among ours.
WITHOUT_SCHEMA = {"ClusterQueue", "LocalQueue", "ResourceFlavor", "ScaledObject"}
GI = 2**30

Manifest = dict[str, Any]


@functools.cache
def built(name: str) -> tuple[Manifest, ...]:
    if shutil.which("kubectl") is None:
        unavailable("kubectl is missing: `make kustomize`")
    made = subprocess.run(["kubectl", "kustomize", CLUSTER / name], capture_output=True, text=True, timeout=60)
    assert made.returncode == 0, made.stderr
    return tuple(yaml.load_all(made.stdout, Loader=yaml.CSafeLoader))


def the(kind: str, name: str) -> Manifest:
    """The only one of its kind."""
    (manifest,) = (m for m in built(name) if m["kind"] == kind)
    return copy.deepcopy(manifest)


def wrong_with(manifest: Manifest) -> list[str]:
    found = [] if manifest["kind"] in WITHOUT_SCHEMA else schemas().check(manifest)
    return found or operator_rules.refused(manifest)  # rules read fields that a schema has seen


def ray_clusters(name: str) -> Iterator[tuple[Manifest, dict[str, Any]]]:
    """What asks for Ray clusters, and the spec of each."""
    for manifest in built(name):
        spec = manifest.get("spec", {})
        if manifest["kind"] == "RayCluster":
            yield manifest, spec
        elif manifest["kind"] in ("RayJob", "RayCronJob"):
            yield manifest, spec.get("jobTemplate", spec)["rayClusterSpec"]


def pods(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for _, spec in ray_clusters(name):
        yield from ((group.get("groupName", "head"), group["template"]["spec"]) for group in groups(spec))
        if autoscaler := spec.get("autoscalerOptions"):  # a container that the operator adds
            yield "head", {**spec["headGroupSpec"]["template"]["spec"], "containers": [autoscaler]}
    yield from (("sandbox", m["spec"]["template"]["spec"]) for m in built(name) if m["kind"] == "Deployment")


def groups(spec: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


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


GPU, TRAIN, TALK, NIGHTLY = "overlays/gpu-8xh100", "jobs/train", "jobs/interactive", "jobs/evaluate"
GROUP = "spec.workerGroupSpecs.0"
SELECTOR = {"ray.io/cluster": "diffrl"}
RULES = "spec.deletionStrategy.deletionRules"
# Where, which field, its value (None: away), and what must be said of it.
PLANTED = [
    (GPU, "RayCluster", "spec.rayVersions", "2.60.0", "'rayVersions' was unexpected"),
    (GPU, "RayCluster", f"{GROUP}.maxReplica", 1, "'maxReplica' was unexpected"),
    (
        GPU,
        "RayCluster",
        f"{GROUP}.template.spec.containers.0.imagePulPolicy",
        "Always",
        "'imagePulPolicy' was unexpected",
    ),
    (GPU, "RayCluster", f"{GROUP}.maxReplicas", "1", "is not of type 'integer'"),
    (GPU, "RayCluster", f"{GROUP}.labels.diffrl/group", 1, "is not of type 'string'"),
    (GPU, "RayCluster", "spec.headGroupSpec.template", None, "'template' is a required property"),
    (GPU, "RayCluster", "spec.authOptions.mode", "tokens", "is not one of ['disabled', 'token']"),
    (GPU, "RayCluster", "spec.autoscalerOptions.version", "v3", "is not one of ['v1', 'v2']"),
    (GPU, "RayCluster", "metadata.label", {}, "'label' was unexpected"),
    (GPU, "RayCluster", f"{GROUP}.template.spec.containers.0.env.1.name", "RAY_USAGE_STATS_ENABLED", "is there twice"),
    (GPU, "RayCluster", f"{GROUP}.template.spec.restartPolicy", "Always", "learner: restartPolicy with autoscaler v2"),
    (GPU, "RayCluster", "spec.headGroupSpec.template.spec.restartPolicy", "OnFailure", "head: restartPolicy"),
    (GPU, "RayCluster", "spec.headGroupSpec.resources", {"CPU": "0"}, "head: resources also in rayStartParams"),
    (GPU, "RayCluster", f"{GROUP}.rayStartParams", {"labels": "a=b"}, "learner: labels in rayStartParams"),
    (GPU, "RayCluster", f"{GROUP}.minReplicas", 2, "learner: minReplicas <= replicas <= maxReplicas"),
    (GPU, "RayCluster", f"{GROUP}.groupName", "rollout", "groups of one name"),
    (GPU, "RayCluster", f"{GROUP}.suspend", True, "learner: suspended with autoscaling"),
    (GPU, "RayCluster", "spec.rayVersion", None, "authOptions: needs a rayVersion"),
    (GPU, "RayCluster", "spec.rayVersion", "2.51.1", "authOptions: needs a rayVersion"),
    (
        *(GPU, "RayCluster", "spec.headGroupSpec.template.spec.containers.0.env.0.name"),
        *("RAY_enable_autoscaler_v2", "RAY_enable_autoscaler_v2 beside"),
    ),
    (GPU, "RayCluster", "metadata.name", "8gpus", "metadata.name"),
    (TRAIN, "RayJob", "metadata.name", "t" * 48, "metadata.name"),
    (TRAIN, "RayJob", "spec.submissionMode", "SideCarMode", "submissionMode: SideCarMode"),
    (TRAIN, "RayJob", "spec.rayClusterSpec", None, "neither rayClusterSpec nor clusterSelector"),
    (TRAIN, "RayJob", "spec.clusterSelector", SELECTOR, "SidecarMode: no clusterSelector"),
    (
        TRAIN,
        "RayJob",
        "spec.rayClusterSpec.headGroupSpec.template.spec.restartPolicy",
        "Always",
        "SidecarMode: restart",
    ),
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
    (TRAIN, "RayJob", "spec.rayClusterSpec.workerGroupSpecs.1.replicas", 5, "rollout: minReplicas <= replicas"),
    (TALK, "RayJob", "spec.backoffLimit", 1, "backoffLimit: not with clusterSelector or InteractiveMode"),
    (TALK, "RayJob", "spec.entrypoint", "true", "entrypoint: of every mode but"),
    (TALK, "RayJob", "spec.submissionMode", None, "entrypoint: of every mode but"),
    (NIGHTLY, "RayCronJob", "spec.schedule", "every night", "schedule: every night"),
    (NIGHTLY, "RayCronJob", "spec.jobTemplate", None, "'jobTemplate' is a required property"),
    (
        NIGHTLY,
        "RayCronJob",
        "spec.jobTemplate.rayClusterSpec.authOptions",
        {"mode": "token", "x": 1},
        "'x' was unexpected",
    ),
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


def test_an_interactive_job_on_a_cluster_that_is_there_takes_no_retries() -> None:
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
    **dict.fromkeys(("overlays/restricted", TALK), ON_GPUS),
    **dict.fromkeys((TRAIN, "overlays/kueue", "overlays/object-store"), AT_ONCE),
    "overlays/spot": ON_GPUS | {"rollout-spot": (ROLLOUT, 0, 8)},
    NIGHTLY: {"rollout": (ROLLOUT, 1, 1)},
}


@pytest.mark.parametrize("name", BUILT)
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


def parsed(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """What the CLI's own parser makes of a command line: the command, its arguments."""
    program, *words = words
    assert program == "diffrl"
    group = typer.main.get_command(app)
    with group.make_context("diffrl", list(words)) as context:
        name, command, rest = group.resolve_command(context, list(words))  # pyright: ignore[reportAttributeAccessIssue]
        return name, command.make_context(name, rest, parent=context).params


def config_of(params: Mapping[str, Any]) -> RLConfig:
    """Of a `diffrl train` on a pod, whose image has the repository's configs in /opt/diffrl."""
    config = load_config(params["config"].replace("/opt/diffrl", str(ROOT)), params["overrides"])
    assert isinstance(config, RLConfig)
    return config


def service_address(kind: str = "Service", name: str = "sandbox") -> str:
    (service,) = (m for m in built("base") if m["kind"] == kind and m["metadata"]["name"] == name)
    return f"{name}:{service['spec']['ports'][0]['port']}"


@pytest.mark.parametrize("name", [TRAIN, "overlays/kueue", "overlays/object-store"])
def test_the_training_job_runs_a_config_for_which_there_is_room(name: str) -> None:
    command, params = parsed(shlex.split(the("RayJob", name)["spec"]["entrypoint"]))
    config = config_of(params)
    assert command == "train" and params["resume"] == "auto"
    assert config.sandbox.backend == "pod" and list(config.sandbox.addresses) == [service_address()]
    assert Path(config.sandbox.token_file or "").parent == Path("/run/diffrl")
    assert config.run_dir.startswith("/shared/")
    assert (config.checkpoint.copy_to or "").startswith("s3://") == (name == "overlays/object-store")
    learner, rollout, reward = (AT_ONCE[group] for group in ("learner", "rollout", "reward"))
    assert config.learner.num_ranks * config.learner.gpus_per_rank == learner[0]["GPU"] * learner[2]
    on_rollout = config.rollout.num_workers * config.rollout.gpus_per_worker
    assert on_rollout + config.num_reference_workers * config.reference.gpus == rollout[0]["GPU"] * rollout[2]
    assert config.judge.num_workers * config.judge.cpus_per_worker <= reward[0]["CPU"] * reward[1]


def test_the_nightly_evaluation_is_a_command() -> None:
    template = the("RayCronJob", NIGHTLY)["spec"]["jobTemplate"]
    command, params = parsed(shlex.split(template["entrypoint"]))
    assert command == "eval" and params["benchmark"] == "humaneval_infilling"
    assert params["backend"] == "pod" and params["address"] == [service_address()]
    assert params["token_file"] == "/run/diffrl/token" and params["tokens"] > 0
    assert params["model"].startswith(
        config_of(parsed(shlex.split(the("RayJob", TRAIN)["spec"]["entrypoint"]))[1]).run_dir
    )
    assert template["entrypointNumGpus"] <= ROLLOUT["GPU"]


@pytest.mark.parametrize("words", ["diffrl train", "diffrl trane configs/mbpp.yaml", "diffrl eval --benchmrak x"])
def test_a_wrong_command_line_is_not_parsed(words: str) -> None:
    with pytest.raises(Exception, match=r"Missing parameter|No such (command|option)"):
        parsed(words.split())


def offered(labels: Mapping[str, str], name: str) -> bool:
    """Whether a group of an overlay has such nodes."""
    return any(
        group.get("labels", {}).items() >= labels.items() for _, spec in ray_clusters(name) for group in groups(spec)
    )


def test_the_labels_that_configs_ask_for_are_offered() -> None:
    def asked(section: Any) -> Iterator[dict[str, str]]:
        if isinstance(section, dict):
            yield from (value for key, value in section.items() if key == "labels" and value)
            for value in section.values():
                yield from asked(value)

    configs = [
        path for path in (ROOT / "configs").rglob("*.yaml") if path.stem not in ("pipeline", "quickstart_pipeline")
    ]
    assert len(configs) >= 10
    for path in configs:
        for labels in asked(load_config(path).model_dump()):
            assert offered(labels, GPU), (path, labels)
    planted = load_config(ROOT / "configs/quickstart_sft.yaml", ["workers.labels={diffrl/group: learner}"]).model_dump()
    (labels,) = asked(planted)
    assert offered(labels, GPU) and not offered({"diffrl/group": "trainer"}, GPU)


def test_jobs_bring_the_cluster_of_the_overlay() -> None:
    """But for the numbers of pods."""
    sizes = ("minReplicas", "replicas", "maxReplicas")

    def shape(name: str) -> dict[str, Any]:
        ((_, spec),) = ray_clusters(name)
        workers = [{k: v for k, v in group.items() if k not in sizes} for group in spec["workerGroupSpecs"]]
        return {**spec, "workerGroupSpecs": workers}

    assert shape(TRAIN) == shape(TALK) == shape(GPU)


def test_one_training_job_fits_into_its_queue() -> None:
    (queue,) = (m["spec"] for m in built("overlays/kueue") if m["kind"] == "ClusterQueue")
    job = the("RayJob", "overlays/kueue")
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "diffrl"}
    (resource_group,) = queue["resourceGroups"]
    quota = {r["name"]: quantity(r["nominalQuota"]) for r in resource_group["flavors"][0]["resources"]}
    assert set(quota) == set(resource_group["coveredResources"])
    asked = dict.fromkeys(quota, 0.0)
    for group in groups(job["spec"]["rayClusterSpec"]):
        for name, amount in group["template"]["spec"]["containers"][0]["resources"]["requests"].items():
            asked[name] += quantity(amount) * group.get("replicas", 1)
    assert all(0 < 2 * asked[name] <= quota[name] for name in quota), asked


def quantity(text: str | int) -> float:
    """Of Kubernetes: 500m, 6Gi, 4."""
    number, unit = re.fullmatch(r"([\d.]+)(\D*)", str(text)).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return float(number) * {"": 1, "m": 0.001, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}[unit]


SANDBOXED = [
    name
    for name in BUILT
    if name == "base" or (name.startswith("overlays/") and name not in ("overlays/kueue", "overlays/object-store"))
]


@pytest.mark.parametrize("name", SANDBOXED)
def test_the_sandbox_pod_is_what_the_judge_needs(name: str) -> None:
    deployment = the("Deployment", name)["spec"]
    spec, labels = deployment["template"]["spec"], deployment["template"]["metadata"]["labels"]
    (judge,) = spec["containers"]
    options = supervisor.parse(judge["args"])
    ports = {port["name"]: port["containerPort"] for port in judge["ports"]}
    assert options.listen == f"0.0.0.0:{ports['judge']}" and ports["judge"] == pod.PORT
    assert options.metrics == f"0.0.0.0:{ports['metrics']}" and ports["metrics"] == pod.METRICS_PORT
    assert deployment["template"]["metadata"]["annotations"]["prometheus.io/port"] == str(ports["metrics"])
    assert "replicas" not in deployment
    # Its files.
    mounts = {mount["mountPath"]: mount["name"] for mount in judge["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    token_file = Path({variable["name"]: variable["value"] for variable in judge["env"]}[supervisor.TOKEN_FILE])
    secret = volumes[mounts[str(token_file.parent)]]["secret"]
    example = yaml.safe_load((CLUSTER / "sandbox-token.example.yaml").read_text())
    assert secret["secretName"] == example["metadata"]["name"] and token_file.name in example["stringData"]
    scratch = volumes[mounts["/scratch"]]["emptyDir"]
    # Its rights and its room: two processes of memory_mb in each slot.
    context = judge["securityContext"]
    assert context["readOnlyRootFilesystem"] is True
    if name != "overlays/restricted":
        assert context["capabilities"] == {"drop": ["ALL"], "add": container.CAPABILITIES}
        assert secret["defaultMode"] == 0o400
    needed = options.slots * 2 * Limits().memory_mb * 2**20 + quantity(scratch["sizeLimit"])
    assert quantity(judge["resources"]["limits"]["memory"]) >= needed
    # It drains: the longest submission ends before it is killed.
    limits, tests = Limits(), 100
    longest_s = 2 * limits.wall_s + limits.cpu_s * (tests + 1)
    assert spec["terminationGracePeriodSeconds"] > judge["lifecycle"]["preStop"]["sleep"]["seconds"] + longest_s
    # Who reaches it, and what it reaches.
    services = [m["spec"] for m in built(name) if m["kind"] == "Service"]
    assert all(service["selector"].items() <= labels.items() for service in services)
    assert {service.get("clusterIP") for service in services} == {None, "None"}
    assert all(ports[port["targetPort"]] == port["port"] for service in services for port in service["ports"])
    (policy,) = (m["spec"] for m in built(name) if m["kind"] == "NetworkPolicy" and m["metadata"]["name"] == "sandbox")
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"} and policy["egress"] == []
    assert [rule["ports"] for rule in policy["ingress"]] == [[{"port": ports["judge"]}], [{"port": ports["metrics"]}]]


ADAPTER = yaml.safe_load((CLUSTER / "adapter-values.yaml").read_text())


@pytest.mark.parametrize("name", SANDBOXED)
def test_sandbox_pods_follow_a_metric_that_there_is(name: str) -> None:
    (rule,) = ADAPTER["rules"]["external"]
    slots = supervisor.parse(the("Deployment", name)["spec"]["template"]["spec"]["containers"][0]["args"]).slots
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
        queries, target = (
            [rule["metricsQuery"], rule["seriesQuery"]],
            quantity(metric["external"]["target"]["averageValue"]),
        )
    assert slots / 2 <= target <= slots  # of a pod: neither idle nor full
    for series in re.findall(r"diffrl_sandbox_\w+", " ".join(queries)):
        assert f"# TYPE {series} gauge" in exported


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
