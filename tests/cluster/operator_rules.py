"""What KubeRay's operator refuses although the schema takes it, and the CRDs' own rules in CEL, as far as they concern us."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

MODES = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
MAX_NAME = {"RayCluster": 63, "RayJob": 47, "RayCronJob": 47}
FIRST_WITH_TOKENS = (2, 52, 0)
IN_RESOURCES_TOO = ("num-cpus", "num-gpus", "memory", "resources")
DELETED_FIRST = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
AUTOSCALER_V2 = "RAY_enable_autoscaler_v2"


def refused(manifest: Mapping[str, Any]) -> list[str]:
    """One line for each rule that the manifest breaks; of other kinds none."""
    checks = {"RayCluster": cluster, "RayJob": job, "RayCronJob": cron_job}
    kind, name = manifest["kind"], manifest["metadata"]["name"]
    if kind not in checks:
        return []
    found = list(checks[kind](manifest["spec"]))
    if len(name) > MAX_NAME[kind] or not re.fullmatch("[a-z]([-a-z0-9]*[a-z0-9])?", name):
        found.append(f"metadata.name: {name}")
    return found


def cluster(spec: Mapping[str, Any]) -> Iterator[str]:
    head, workers = spec["headGroupSpec"], spec.get("workerGroupSpecs", [])
    autoscaling = bool(spec.get("enableInTreeAutoscaling"))
    version = (spec.get("autoscalerOptions") or {}).get("version")
    for name, group in (("head", head), *((worker["groupName"], worker) for worker in workers)):
        params, pod = group.get("rayStartParams") or {}, group["template"]["spec"]
        if not pod["containers"]:
            yield f"{name}: no container"
        if group.get("resources") and any(params.get(key) for key in IN_RESOURCES_TOO):
            yield f"{name}: resources also in rayStartParams"
        if "labels" in params:
            yield f"{name}: labels in rayStartParams"
        if autoscaling and version == "v2" and pod.get("restartPolicy", "Never") != "Never":
            yield f"{name}: restartPolicy with autoscaler v2"
        if autoscaling and group.get("suspend"):
            yield f"{name}: suspended with autoscaling"
    for group in workers:
        least, most = group.get("minReplicas", 0), group.get("maxReplicas", 2**31 - 1)
        if not least <= group.get("replicas", least) <= most:
            yield f"{group['groupName']}: minReplicas <= replicas <= maxReplicas"
    names = [group["groupName"] for group in workers]
    if len(set(names)) < len(names):
        yield f"groups of one name: {names}"
    env = {
        variable["name"]: variable.get("value")
        for c in head["template"]["spec"]["containers"]
        for variable in c.get("env", [])
    }
    if AUTOSCALER_V2 in env and (version or (not autoscaling and env[AUTOSCALER_V2] in ("1", "true"))):
        yield f"{AUTOSCALER_V2} beside autoscalerOptions.version, or without autoscaling"
    if "RAY_REDIS_ADDRESS" in env:
        yield "RAY_REDIS_ADDRESS: belongs into gcsFaultToleranceOptions"
    if (spec.get("authOptions") or {}).get("mode") == "token":
        given = tuple(map(int, re.findall(r"\d+", spec.get("rayVersion", ""))))
        if given < FIRST_WITH_TOKENS:
            yield f"authOptions: needs a rayVersion of {FIRST_WITH_TOKENS} or later"


def job(spec: Mapping[str, Any]) -> Iterator[str]:
    mode, selector = spec.get("submissionMode", "K8sJobMode"), spec.get("clusterSelector")
    own = spec.get("rayClusterSpec")
    if mode not in MODES:
        yield f"submissionMode: {mode}"
    if not own and not selector:
        yield "neither rayClusterSpec nor clusterSelector"
    if mode == "SidecarMode":
        if selector or spec.get("submitterPodTemplate") or spec.get("submitterConfig"):
            yield "SidecarMode: no clusterSelector, submitterPodTemplate or submitterConfig"
        if own and own["headGroupSpec"]["template"]["spec"].get("restartPolicy", "Never") != "Never":
            yield "SidecarMode: restartPolicy of the head"
    if spec.get("backoffLimit") and (selector or mode == "InteractiveMode"):
        yield "backoffLimit: not with clusterSelector or InteractiveMode"
    if bool(spec.get("entrypoint")) == (mode == "InteractiveMode"):
        yield "entrypoint: of every mode but InteractiveMode"
    if spec.get("suspend") and (selector or not spec.get("shutdownAfterJobFinishes")):
        yield "suspend: needs shutdownAfterJobFinishes and a cluster of its own"
    yield from deletion(spec)
    if own:
        yield from cluster(own)


def deletion(spec: Mapping[str, Any]) -> Iterator[str]:
    strategy, shutdown = spec.get("deletionStrategy"), spec.get("shutdownAfterJobFinishes")
    if spec.get("ttlSecondsAfterFinished") and not shutdown:
        yield "ttlSecondsAfterFinished: needs shutdownAfterJobFinishes"
    if not strategy:
        return
    rules = strategy.get("deletionRules", [])
    if not rules or strategy.keys() - {"deletionRules"}:
        yield "deletionStrategy: deletionRules, and nothing beside them"
    if shutdown:
        yield "deletionRules: not with shutdownAfterJobFinishes"
    times: dict[str, dict[str, int]] = {}
    for rule in rules:
        policy, condition = rule["policy"], rule["condition"]
        when = [condition[key] for key in ("jobStatus", "jobDeploymentStatus") if key in condition]
        if len(when) != 1:
            yield "deletionRules: either jobStatus or jobDeploymentStatus"
            continue
        if spec.get("clusterSelector") and policy in ("DeleteCluster", "DeleteWorkers"):
            yield f"{policy}: not with clusterSelector"
        if policy == "DeleteWorkers" and (spec.get("rayClusterSpec") or {}).get("enableInTreeAutoscaling"):
            yield f"{policy}: not with autoscaling"
        of_status = times.setdefault("jobStatus " + when[0] if "jobStatus" in condition else when[0], {})
        if policy in of_status:
            yield f"deletionRules: {policy} twice for {when[0]}"
        of_status[policy] = condition.get("ttlSeconds", 0)
    for status, by_policy in times.items():
        in_order = [by_policy[policy] for policy in DELETED_FIRST if policy in by_policy]
        if in_order != sorted(in_order):
            yield f"deletionRules: ttlSeconds of {status} must grow from workers to cluster to job"


def cron_job(spec: Mapping[str, Any]) -> Iterator[str]:
    if len(spec["schedule"].split()) != 5 or re.search(r"[^\d*/,\- ]", spec["schedule"]):
        yield f"schedule: {spec['schedule']}"
    yield from job(spec["jobTemplate"])
