"""What the jobs of cluster/ run: commands that the CLI takes, configs for which their clusters have room."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer.main

from actors.cli import app
from actors.placement import Node, asks_of, unplaced
from diffrl.config import RLConfig
from diffrl.config_file import load_config
from tests.cluster.manifests import GPU, NIGHTLY, ROOT, TALK, TRAIN, built, groups, quantity, ray_clusters, the


def parsed(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """What the CLI's own parser makes of a command line: the command, its arguments."""
    program, *words = words
    assert program == "diffrl"
    group = typer.main.get_command(app)
    with group.make_context("diffrl", list(words)) as context:
        name, command, rest = group.resolve_command(context, list(words))
        return name, command.make_context(name, rest, parent=context).params


def config_of(params: Mapping[str, Any]) -> RLConfig:
    """Of a `diffrl train` on a pod, whose image has the repository's configs in /opt/diffrl."""
    config = load_config(params["config"].replace("/opt/diffrl", str(ROOT)), params["overrides"])
    assert isinstance(config, RLConfig)
    return config


def service_address() -> str:
    (service,) = (m for m in built("base") if m["kind"] == "Service")
    return f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"


def room(name: str, group: str, resource: str, pods: str = "replicas") -> float:
    """Of a resource, in all pods with which a group begins, or of which it may have `maxReplicas`."""
    ((_, spec),) = ray_clusters(name)
    (found,) = (worker for worker in spec["workerGroupSpecs"] if worker["groupName"] == group)
    return quantity(found["template"]["spec"]["containers"][0]["resources"]["limits"][resource]) * found[pods]


@pytest.mark.parametrize("name", [TRAIN, "overlays/kueue", "overlays/object-store"])
def test_the_training_job_runs_a_config_for_which_there_is_room(name: str) -> None:
    command, params = parsed(shlex.split(the("RayJob", name)["spec"]["entrypoint"]))
    config = config_of(params)
    assert command == "train" and params["resume"] == "auto"
    assert config.sandbox.backend == "pod" and list(config.sandbox.addresses) == [service_address()]
    assert Path(config.sandbox.token_file or "").parent == Path("/run/diffrl")
    assert config.run_dir.startswith("/shared/")
    assert (config.checkpoint.copy_to or "").startswith("s3://") == (name == "overlays/object-store")
    assert config.learner.num_ranks * config.learner.gpus_per_rank == room(name, "learner", "nvidia.com/gpu")
    sampling = config.rollout.num_workers * config.rollout.gpus_per_worker
    scoring = config.num_reference_workers * config.reference.gpus
    assert sampling + scoring == room(name, "rollout", "nvidia.com/gpu")
    assert config.judge.num_workers * config.judge.cpus_per_worker <= room(name, "reward", "cpu")
    assert config.judge.num_workers < config.judge.most == config.train.prompts_per_step
    assert config.judge.most * config.judge.cpus_per_worker <= room(name, "reward", "cpu", "maxReplicas")
    asks, there = asks_of(config), list(nodes(name))
    assert all(each.labels for each in asks) and unplaced(asks, there) == []
    learner, *others = asks
    assert unplaced([replace(learner, count=5), *others], there) == [(replace(learner, count=5), 4)]


def nodes(name: str) -> Iterator[Node]:
    """With which a cluster begins."""
    ((_, spec),) = ray_clusters(name)
    for group in spec["workerGroupSpecs"]:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        resources = {"CPU": quantity(limits["cpu"]), "GPU": quantity(limits.get("nvidia.com/gpu", 0))}
        for _ in range(group["replicas"]):
            yield Node(id=group["groupName"], resources=resources, labels=group["labels"], since=0.0)


def test_the_nightly_evaluation_is_a_command() -> None:
    template = the("RayCronJob", NIGHTLY)["spec"]["jobTemplate"]
    command, params = parsed(shlex.split(template["entrypoint"]))
    assert command == "eval" and params["benchmark"] == "humaneval_infilling"
    assert params["backend"] == "pod" and params["address"] == [service_address()]
    assert params["token_file"] == "/run/diffrl/token" and params["tokens"] > 0
    trained = config_of(parsed(shlex.split(the("RayJob", TRAIN)["spec"]["entrypoint"]))[1])
    assert trained.eval.every is not None and params["model"] == f"{trained.run_dir}/best"
    assert template["entrypointNumGpus"] <= room(NIGHTLY, "rollout", "nvidia.com/gpu")


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

    of_no_stage = ("pipeline", "curate", "analysis")
    configs = [path for path in (ROOT / "configs").rglob("*.yaml") if not path.stem.endswith(of_no_stage)]
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


def test_two_training_jobs_fit_into_their_queue() -> None:
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
