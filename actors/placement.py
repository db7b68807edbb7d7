"""What a run asks of a cluster's nodes, and whether there is room for it.

Ray leaves an actor that fits nowhere pending for ever. So what is asked is compared with what all nodes have before
anything starts: by `check_cluster` in a dry run too, by `make_room` once more when the run is in the cluster. Where it is not
enough, the autoscaler is asked. Ray does not tell what an autoscaler could add, so that it gets a placement group of all
that is asked: v2 answers within seconds that it cannot be, and adds nothing, or adds nodes, for which the run waits. v1 does
not answer: then the run waits until supervision.start_s is over.
"""

import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import ray
from ray._private import worker
from ray._private.label_utils import validate_label_selector
from ray._private.services import canonicalize_bootstrap_address
from ray._raylet import GcsClient  # pyright: ignore[reportAttributeAccessIssue]
from ray.core.generated import autoscaler_pb2
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from actors.machine import CONNECT_S, check_ray
from actors.processes import LOOK_S, begin_on_node, one_line
from diffrl.config import AnyConfig, RLConfig
from diffrl.config.pipeline import EvaluationConfig
from diffrl.errors import ConfigError, RunStoppedError, shown

ANSWER_S = 60.0  # of the head, about its cluster
JOIN_S = 600.0  # from one node of a new cluster to the next, with its image
POLL_S = 1.0
SEEN_S = 10.0  # a file that is written on one node is there on the others
MIN_CPUS = 0.0001  # the least that a bundle holds
MAX_KINDS = 5  # of nodes that an error names
UNSCALED = re.compile("node_[0-9a-f]{56}")  # the kind of a node, as v1 calls it, where nothing scales


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Places for the workers of one role.

    Ask(number="rollout.num_workers", count=4, cpus="rollout.cpus_per_worker", gpus="rollout.gpus_per_worker",
    resources={"CPU": 1.0, "GPU": 1.0}, labels={"diffrl/group": "rollout"})
    """

    number: str  # keys of the config that it is made from
    cpus: str
    gpus: str | None
    count: int
    resources: Mapping[str, float]  # of each
    labels: Mapping[str, str]
    together: bool = False  # all on one node

    @property
    def section(self) -> str:
        return self.number.partition(".")[0]

    @property
    def bundle(self) -> dict[str, float]:
        """What must fit into a node at once."""
        times = self.count if self.together else 1
        return {name: times * amount for name, amount in self.resources.items() if amount}

    @property
    def num_bundles(self) -> int:
        return min(self.count, 1) if self.together else self.count

    def __str__(self) -> str:
        amounts = " and ".join(f"{amount:g} {name}s" for name, amount in self.resources.items() if amount)
        labels = f" on nodes with {shown(dict(self.labels))} ({self.section}.labels)" if self.labels else ""
        return f"{self.number}: {self.count} with {amounts or 'no CPUs'} each{labels}{' on one node' * self.together}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """Node(id="1014...", resources={"CPU": 8.0, "GPU": 1.0}, labels={"diffrl/group": "rollout"}, since=1.8e9)"""

    id: str
    resources: Mapping[str, float]  # all it has, whoever uses it
    labels: Mapping[str, str]
    since: float  # seconds of the clock

    def __str__(self) -> str:
        amounts = [f"{self.resources.get(name, 0.0):g} {name}s" for name in ("CPU", "GPU")]
        own = [f"{key}={value}" for key, value in sorted(self.labels.items()) if not key.startswith("ray.io/")]
        return ", ".join([*amounts, *own])


# What is asked


def asks_of(config: AnyConfig, *, samples: bool = True) -> list[Ask]:
    """`samples`: with the workers of RL that sample and judge."""
    if not isinstance(config, RLConfig):
        return [ask("workers", "num_workers", "per_worker", config.workers)]
    reference = Ask(
        number="reference.num_workers",
        cpus="reference.cpus",
        gpus="reference.gpus",
        count=config.num_reference_workers,
        resources={"CPU": config.reference.cpus, "GPU": config.reference.gpus},
        labels=config.reference.labels,
    )
    sampling = [
        ask("rollout", "num_workers", "per_worker", config.rollout),
        ask("judge", "num_workers", "per_worker", config.judge),
    ]
    return [ask_of_learner(config), reference, *(sampling if samples else [])]


def ask_of_learner(config: RLConfig) -> Ask:
    together = config.learner.placement == "STRICT_PACK"
    return ask("learner", "num_ranks", "per_rank", config.learner, together=together)


def ask_of_evaluation(config: EvaluationConfig) -> Ask:
    return ask("evaluation", "num_workers", "per_worker", config)


def ask(section: str, number: str, each: str, settings: Any, *, together: bool = False) -> Ask:
    """From the keys that most sections have."""
    gpus = getattr(settings, f"gpus_{each}", None)
    return Ask(
        number=f"{section}.{number}",
        cpus=f"{section}.cpus_{each}",
        gpus=None if gpus is None else f"{section}.gpus_{each}",
        count=getattr(settings, number),
        resources={"CPU": getattr(settings, f"cpus_{each}"), "GPU": gpus or 0.0},
        labels=settings.labels,
        together=together,
    )


def check_labels(asks: Sequence[Ask], address: str | None) -> None:
    """Ray's own rules, which it would only state when it starts an actor; and a cluster whose nodes may have labels."""
    for each in asks:
        field = f"{each.section}.labels"
        if wrong := validate_label_selector(dict(each.labels)):
            raise ConfigError(f"{field}: {shown(dict(each.labels))} cannot be used: {one_line(wrong)}")
        if each.labels and (is_own_cluster() if ray.is_initialized() else given(address) is None):
            raise ConfigError(
                f"{field}: {shown(dict(each.labels))} must be {{}} on a cluster that starts with the run, whose node has no "
                "labels; leave it out, or join a cluster (ray.address)"
            )


# Whether there is room


def unplaced(asks: Sequence[Ask], nodes: Sequence[Node]) -> list[tuple[Ask, int]]:
    """The roles for which there is no room, and how many workers of each have a place.

    First fit over the nodes in their order, roles with labels and those with GPUs first: simpler than what Ray does, so
    that now and then something is refused that a better order would have made fit.
    """
    rests = [dict(node.resources) for node in nodes]
    missing = []
    for each in sorted(asks, key=lambda a: (bool(a.labels), a.resources.get("GPU", 0.0), a.together), reverse=True):
        left, need = each.num_bundles, each.bundle
        for node, rest in zip(nodes, rests, strict=True):
            if selects(each.labels, node.labels):
                taken = min(left, room(rest, need))
                left -= taken
                for name, amount in need.items():
                    rest[name] = rest.get(name, 0.0) - taken * amount
        if left:
            missing.append((each, 0 if each.together else each.count - left))
    return missing


def room(rest: Mapping[str, float], need: Mapping[str, float]) -> float:
    """How often it fits."""
    return min((math.floor(rest.get(name, 0.0) / need[name] + 1e-6) for name in need), default=math.inf)


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Ray's rule for one node: a value, `in(a, b)`, or either of them behind a `!`."""
    for key, wanted in selector.items():
        text = wanted.removeprefix("!")
        names = text[3:-1].replace(" ", "").split(",") if text.startswith("in(") else [text]
        if (labels.get(key) in names) == wanted.startswith("!"):
            return False
    return True


def refusal(missing: Sequence[tuple[Ask, int]], nodes: Sequence[Node], growth: str) -> str:
    """What is asked, what exists, what could be added, the way out."""
    words = "; ".join(f"{each}, of which {placed} find a place" for each, placed in missing)
    kinds = Counter(map(str, nodes)).most_common()
    there = "; ".join(f"{number} x ({kind})" for kind, number in kinds[:MAX_KINDS]) or "none"
    more = f"; {len(kinds) - MAX_KINDS} other kinds" if len(kinds) > MAX_KINDS else ""
    first = missing[0][0]
    keys = [first.number, first.cpus, *([first.gpus] if first.gpus else [])]
    change = f", change {first.section}.labels" if first.labels else ""
    return f"{words}. The cluster's nodes: {there}{more}. {growth}: lower {' or '.join(keys)}{change}, or add nodes"


# The cluster


def given(address: str | None) -> str | None:
    """Where a run would join a cluster; None: it starts one."""
    address = address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address


def is_own_cluster() -> bool:
    """Whether this process has started the one that it is in: nobody else joins it."""
    return worker._global_node is not None and worker._global_node.is_head()


def head_address(address: str | None) -> str | None:
    """Of the cluster that a run is in or would join, if one answers there."""
    if ray.is_initialized():
        return ray.get_runtime_context().gcs_address
    address = given(address)
    if address is None:
        return None
    with suppress(ValueError, ConnectionError):  # not an address; auto, and there is none
        found = canonicalize_bootstrap_address(address)
        if found is not None and check_ray(found, timeout=CONNECT_S).verdict == "ok":
            return found
    return None


def nodes_of(head: GcsClient) -> list[Node]:
    """Those that are alive."""
    infos = head.get_all_node_info(timeout=ANSWER_S).values()
    return [
        Node(
            id=info.node_id.hex(),
            resources=dict(info.resources_total),
            labels=dict(info.labels),
            since=info.start_time_ms / 1000,
        )
        for info in infos
        if info.state == info.ALIVE
    ]


def autoscaling_state(head: GcsClient) -> Any:
    """What an autoscaler v2 said last."""
    reply = autoscaler_pb2.GetClusterStatusReply()  # pyright: ignore[reportAttributeAccessIssue]
    reply.ParseFromString(head.get_cluster_status(timeout_s=ANSWER_S))
    return reply.autoscaling_state if reply.HasField("autoscaling_state") else None


def grows(head: GcsClient, nodes: Sequence[Node]) -> bool:
    """Whether nodes may come: there is an autoscaler, or the cluster has just been started."""
    if is_own_cluster():
        return False
    if time.time() - max(node.since for node in nodes) < JOIN_S or autoscaling_state(head) is not None:
        return True
    status = json.loads(head.internal_kv_get(b"__autoscaling_status", None, timeout=ANSWER_S) or "{}")
    kinds = status.get("autoscaler_report", {}).get("active_nodes") or {}
    return not all(UNSCALED.fullmatch(kind) for kind in kinds)


def check_cluster(asks: Sequence[Ask], address: str | None) -> str | None:
    """What cannot be said of the cluster that a run is in or would join. Raises ConfigError when there is no room and none
    will be."""
    found = head_address(address)
    if found is None:
        return given(address) and f"the cluster at {given(address)}, which does not answer"
    try:
        head = GcsClient(address=found)
        nodes = nodes_of(head)
        missing = unplaced(asks, nodes)
        if not missing:
            return None
        if grows(head, nodes):
            return refusal(missing, nodes, "More may come, which is known when a run asks for them")
    except RayError as error:
        return f"the cluster at {found}: {' '.join(str(error).split())}"
    raise ConfigError(refusal(missing, nodes, "Nothing adds nodes"))


def make_room(asks: Sequence[Ask], start_s: float, key: str = "supervision.start_s") -> None:
    """Wait in a cluster that the run is in until its nodes have room. Raises ConfigError when they never will,
    RunStoppedError when they still do not after `start_s`, which is the config's `key`."""
    head = GcsClient(address=ray.get_runtime_context().gcs_address)
    missing = unplaced(asks, nodes_of(head))
    if not missing:
        return
    deadline = time.monotonic() + start_s
    words = "; ".join(str(each) for each, _ in missing)
    print(f"waiting up to {start_s:g} seconds for nodes, if any can come: {words}", file=sys.stderr, flush=True)
    group = group_of(asks)
    try:
        while missing := unplaced(asks, nodes := nodes_of(head)):
            state = autoscaling_state(head)
            if state is not None and any(
                request.details.startswith(group.id.hex()) for request in state.infeasible_gang_resource_requests
            ):
                raise ConfigError(refusal(missing, nodes, "The autoscaler can add no nodes that make room"))
            if not grows(head, nodes):
                raise ConfigError(refusal(missing, nodes, "Nothing adds nodes"))
            if time.monotonic() > deadline:
                raise RunStoppedError(
                    f"{key}: {start_s:g} seconds were not enough. {refusal(missing, nodes, 'Not enough were added')}"
                )
            time.sleep(POLL_S)
    finally:
        remove_placement_group(group)


def group_of(asks: Sequence[Ask]) -> PlacementGroup:
    """All that is asked, as one."""
    bundles, selectors = bundles_of(asks)
    return placement_group(bundles, strategy="PACK", bundle_label_selector=selectors)


def bundles_of(asks: Sequence[Ask]) -> tuple[list[dict[str, float]], list[dict[str, str]]]:
    """In Ray's words, with the labels of each."""
    each_once = [each for each in asks for _ in range(each.num_bundles)]
    return [each.bundle or {"CPU": MIN_CPUS} for each in each_once], [dict(each.labels) for each in each_once]


# Files that all nodes see


def hosts(asks: Sequence[Ask]) -> Iterator[str]:
    """Ids of the nodes of the run's cluster on which its workers may be."""
    for node in nodes_of(GcsClient(address=ray.get_runtime_context().gcs_address)):
        if any(selects(each.labels, node.labels) and room(node.resources, each.bundle) for each in asks):
            yield node.id


def require_shared(folder: Path, node_ids: Sequence[str]) -> None:
    """Raises ConfigError unless these nodes see what this one writes into the run's folder."""
    others = set(node_ids) - {ray.get_runtime_context().get_node_id(), ""}  # one that cannot be found out
    if not others or not folder.is_dir():
        return
    with NamedTemporaryFile(dir=folder, prefix=".seen-") as file:
        answers = {node_id: begin_on_node(node_id, is_seen, Path(file.name)) for node_id in sorted(others)}
        ray.wait(list(answers.values()), num_returns=len(answers), timeout=LOOK_S)
        unseen = {node_id for node_id, answer in answers.items() if not was_seen(answer)}
    for node in ray.nodes():
        if node["NodeID"] in unseen:
            raise ConfigError(
                f"run_dir: {folder} is not seen on node {node['NodeManagerAddress']} ({node['NodeID'][:12]}), where workers "
                "write to it; choose a folder on a file system that all nodes share"
            )


def was_seen(answer: "ray.ObjectRef[bool]") -> bool:
    try:
        return ray.get(answer, timeout=0)
    except RayError:  # the node is gone, or has no time: not what is asked here
        return True


def is_seen(file: Path) -> bool:
    """A shared file system may take a moment."""
    deadline = time.monotonic() + SEEN_S
    while not file.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
