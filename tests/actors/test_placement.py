"""Where actors go, and what is refused before any of them starts."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.placement_group import placement_group_table

from actors import placement
from actors.dry_run import dry_run
from actors.learner import Learner, RankLostError
from actors.placement import (
    Ask,
    Node,
    asks_of,
    check_cluster,
    check_labels,
    hosts,
    make_room,
    refusal,
    require_shared,
    selects,
    unplaced,
)
from actors.processes import place_of
from actors.system import System, connect, num_cpus_needed, num_cpus_used
from diffrl.config import RLConfig, SupervisionConfig
from diffrl.config_file import validate
from diffrl.errors import ConfigError, RunStoppedError
from tests.conftest import RayCluster, free_ports

GROUP = "diffrl/group"
JOIN_S = 240.0  # a node, on a busy machine


def config_of(run_dir: object = "runs/new", **sections: Any) -> RLConfig:
    raw = {
        "stage": "rl",
        "run_dir": str(run_dir),
        "data": {"source": "microcode"},
        "train": {"steps": 1, "prompts_per_step": 4},
        "sandbox": {"backend": "process", "allow_unisolated": True},
    }
    config = validate(raw | sections, "test")
    assert isinstance(config, RLConfig)
    return config


# What is asked, and whether it fits


def ask(name: str, count: int, cpus: float = 1.0, gpus: float = 0.0, *, together: bool = False, **labels: str) -> Ask:
    return Ask(
        number=f"{name}.num_workers",
        cpus=f"{name}.cpus_per_worker",
        gpus=f"{name}.gpus_per_worker",
        count=count,
        resources={"CPU": cpus, "GPU": gpus},
        labels=labels,
        together=together,
    )


def node(cpus: float, gpus: float = 0.0, **labels: str) -> Node:
    amounts = {"CPU": cpus, "memory": 1e9} | ({"GPU": gpus} if gpus else {})  # as Ray says it
    return Node(id="1", resources=amounts, labels=labels, since=0.0)


@pytest.mark.parametrize(
    ("asks", "nodes", "placed"),
    [
        ([ask("a", 4)], [node(4)], {}),
        ([ask("a", 5)], [node(4)], {"a": 4}),
        ([ask("a", 5)], [node(4), node(1)], {}),
        ([ask("a", 2, cpus=3)], [node(4), node(2)], {"a": 1}),  # five CPUs, of which three are together only once
        ([ask("a", 16, cpus=0.25)], [node(4)], {}),
        ([ask("a", 3, cpus=0.1)], [node(0.3)], {}),
        ([ask("a", 7, cpus=0)], [node(0)], {}),
        ([ask("a", 1, cpus=0)], [], {"a": 0}),
        ([ask("a", 0)], [], {}),
        ([ask("a", 2, gpus=1)], [node(8), node(8, 2)], {}),
        ([ask("a", 2, gpus=1)], [node(8)], {"a": 0}),
        ([ask("a", 3), ask("b", 2)], [node(4)], {"b": 1}),
        ([ask("a", 3), ask("b", 2, g="x")], [node(4, g="x"), node(1)], {}),  # those with labels come first
        ([ask("a", 3), ask("b", 1, gpus=1)], [node(3, 1), node(1)], {}),  # those with GPUs too
        ([ask("a", 1, g="x")], [node(4, g="y"), node(4)], {"a": 0}),
        ([ask("a", 2, g="!x")], [node(4, g="x"), node(1)], {"a": 1}),
        ([ask("a", 4, together=True)], [node(3), node(3)], {"a": 0}),
        ([ask("a", 4, together=True)], [node(3), node(4)], {}),
        ([ask("a", 2**62)], [node(4)], {"a": 4}),
    ],
)
def test_what_fits(asks: list[Ask], nodes: list[Node], placed: dict[str, int]):
    assert {each.section: number for each, number in unplaced(asks, nodes)} == placed


@pytest.mark.parametrize(
    ("wanted", "has", "found"),
    [
        ({}, {"g": "x"}, True),
        ({"g": "x"}, {"g": "x", "h": "y"}, True),
        ({"g": "x"}, {}, False),
        ({"g": "x", "h": "z"}, {"g": "x", "h": "y"}, False),
        ({"g": "in(x, y)"}, {"g": "y"}, True),
        ({"g": "in(x,y)"}, {"g": "z"}, False),
        ({"g": "!in(x, y)"}, {"g": "y"}, False),
        ({"g": "!x"}, {"g": "y"}, True),
        ({"g": "!x"}, {}, True),
    ],
)
def test_labels_select_nodes(wanted: dict[str, str], has: dict[str, str], found: bool):
    assert selects(wanted, has) == found


def test_every_role_asks_with_the_keys_of_its_section():
    config = config_of(
        rollout={"num_workers": 3, "gpus_per_worker": 1, "labels": {GROUP: "rollout"}},
        judge={"num_workers": 2, "max_workers": 5, "cpus_per_worker": 0.5, "labels": {GROUP: "reward"}},
        reference={"gpus": 0.5, "labels": {GROUP: "rollout"}},
        learner={"num_ranks": 4, "cpus_per_rank": 2, "gpus_per_rank": 1, "labels": {GROUP: "learner"}},
    )
    found = {each.number: (each.count, dict(each.resources), dict(each.labels)) for each in asks_of(config)}
    assert found == {
        "learner.num_ranks": (4, {"CPU": 2, "GPU": 1}, {GROUP: "learner"}),
        "reference.num_workers": (1, {"CPU": 1, "GPU": 0.5}, {GROUP: "rollout"}),
        "rollout.num_workers": (3, {"CPU": 1, "GPU": 1}, {GROUP: "rollout"}),
        "judge.num_workers": (2, {"CPU": 0.5, "GPU": 0}, {GROUP: "reward"}),
    }
    assert num_cpus_used(config) == num_cpus_needed(config) + 3 * 0.5
    assert not any(each.together for each in asks_of(config))
    assert [each.section for each in asks_of(config, samples=False)] == ["learner", "reference"]
    assert asks_of(config_of(learner={"num_ranks": 2, "placement": "STRICT_PACK"}))[0].together
    assert asks_of(config_of(method={"kl_coef": 0.0}))[1].count == 0
    fields = config.model_dump()
    for each in asks_of(config):
        for key in (each.number, each.cpus, each.gpus, f"{each.section}.labels"):
            section, _, name = (key or f"{each.section}.labels").partition(".")
            assert name in fields[section]


def test_a_refusal_says_what_is_asked_what_there_is_and_the_way_out():
    asks = [ask("rollout", 3, gpus=1, group="rollout"), ask("judge", 1)]
    nodes = [node(4, 1, group="rollout"), node(4, 1, group="rollout"), node(2)]
    assert refusal(unplaced(asks, nodes), nodes, "Nothing adds nodes") == (
        "rollout.num_workers: 3 with 1 CPUs and 1 GPUs each on nodes with {'group': 'rollout'} (rollout.labels), of which 2 find "
        "a place. The cluster's nodes: 2 x (4 CPUs, 1 GPUs, group=rollout); 1 x (2 CPUs, 0 GPUs). Nothing adds nodes: lower "
        "rollout.num_workers or rollout.cpus_per_worker or rollout.gpus_per_worker, change rollout.labels, or add nodes"
    )
    many = [node(number) for number in range(40)]
    assert len(refusal(unplaced(asks, many), many, "Nothing adds nodes")) < 700


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ({"diffrl group": "x"}, "rollout.labels: {'diffrl group': 'x'} cannot be used: Invalid label key"),
        ({"g": "a b"}, "rollout.labels: {'g': 'a b'} cannot be used: Invalid label selector value"),
        ({"g": "x"}, "rollout.labels: {'g': 'x'} must be {} on a cluster that starts with the run"),
    ],
)
def test_labels_that_no_node_can_have(monkeypatch: pytest.MonkeyPatch, labels: dict[str, str], said: str):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError) as caught:
        check_labels(asks_of(config_of(rollout={"labels": labels})), None)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
    check_labels(asks_of(config_of(rollout={"labels": {"g": "in(x, y)"}})), "head:6379")


# On a cluster of two nodes


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of which the second node has another."""
    return tmp_path_factory.mktemp("hidden")


@pytest.fixture(scope="module")
def second_node(ray_cluster: RayCluster, hidden: Path) -> Iterator[str]:
    """Id of a node for learners, which is there as long as this module's tests are."""
    (agent_port,) = free_ports(1)
    start = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={ray_cluster.address}", "--block"),
        *("--num-cpus=4", f"--labels={GROUP}=learner", "--node-ip-address=127.0.0.1"),
        *(f"--dashboard-agent-listen-port={agent_port}", f"--object-store-memory={100 << 20}"),
    ]
    command = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {hidden} && exec "$@"', "sh", *start]
    log = hidden.with_suffix(".log")

    def started() -> subprocess.Popen:
        with log.open("w") as output:
            return subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)

    process = started()
    try:
        deadline = time.monotonic() + JOIN_S
        while not (found := labelled("learner")):
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            if process.poll() is not None:  # Ray gives a node 30 seconds to start
                process = started()
            time.sleep(0.2)
        yield found[0]
    finally:
        process.terminate()
        process.wait(60)
        while labelled("learner"):  # no actor of a later test may go there
            time.sleep(0.2)


def labelled(group: str) -> list[str]:
    return [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Labels"].get(GROUP) == group]


@pytest.fixture
def idle_actors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Actors that do nothing in the places of those that do."""

    class Idle:
        def __init__(self, *args: Any, **kwargs: Any):
            """Whatever the others get."""

        def close(self) -> None: ...

        def rendezvous(self) -> tuple[str, int]:
            return "here", 1

        def start(self, address: str, port: int) -> None: ...

    for name in ("system.RolloutWorker", "system.RewardWorker", "system.Reference", "learner.LearnerRank"):
        monkeypatch.setattr(f"actors.{name}", Idle)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """No node is on its way any more."""
    monkeypatch.setattr(placement, "JOIN_S", 0.0)


ELSEWHERE = {"labels": {GROUP: "!learner"}}
QUARTER = {"cpus_per_worker": 0.25}


def test_actors_go_to_the_nodes_with_their_labels(second_node: str, idle_actors: None, tmp_path: Path):
    config = config_of(
        tmp_path,
        rollout=QUARTER | ELSEWHERE,
        judge={**QUARTER, "labels": {GROUP: "learner"}},
        reference={"cpus": 0.25, **ELSEWHERE},
        learner={"num_ranks": 2, "cpus_per_rank": 0.25, "placement": "STRICT_PACK", "labels": {GROUP: "learner"}},
        supervision={"backoff_s": 0.0},
    )
    tokenizer: Any = None  # the actors' alone
    with Learner(config, tokenizer, 1) as learner, System(config, tokenizer) as system:
        system.wait_ready()
        learner.start()
        places = {name: [place_of(worker).node_id for worker in pool.workers] for name, pool in system.pools().items()}
        (here,) = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - {second_node}
        assert places == {"rollout": [here], "judge": [second_node], "reference": [here]}
        assert [place_of(rank).node_id for rank in learner.ranks] == [second_node] * 2
        first = learner.place
        learner.rebuild(RankLostError("a test"))
        assert [place_of(rank).node_id for rank in learner.ranks] == [second_node] * 2
        second = learner.place
    assert first is not None and second is not None and first.id != second.id
    for place in (first, second):
        assert placement_group_table(place)["state"] == "REMOVED"


def test_ranks_that_others_keep_from_their_places(second_node: str, idle_actors: None, tmp_path: Path):
    none = {"cpus_per_worker": 0.0}
    config = config_of(
        tmp_path,
        rollout={"num_workers": 2, "cpus_per_worker": 8.0, "labels": {GROUP: "!learner"}},
        judge=none,
        reference={"cpus": 0.0},
        learner={"num_ranks": 2, "cpus_per_rank": 2.25},
    )
    hurried = config.model_copy(update={"supervision": SupervisionConfig(start_s=1.0)})
    tokenizer: Any = None
    with (
        System(config, tokenizer) as system,
        pytest.raises(
            RunStoppedError, match=r"^supervision.start_s: in 1 seconds .* learner.num_ranks: 2 with 2.25 CPUs each; "
        ),
    ):
        system.wait_ready()
        Learner(hurried, tokenizer, 1)
    assert {row["state"] for row in placement_group_table().values()} == {"REMOVED"}


def test_a_folder_that_a_rank_does_not_see_is_refused(
    second_node: str, idle_actors: None, hidden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One that takes up nothing, and goes by its labels all the same."""
    monkeypatch.setattr(placement, "SEEN_S", 0.5)
    learner = {"cpus_per_rank": 0.0, "labels": {GROUP: "learner"}}
    tokenizer: Any = None
    with (
        Learner(config_of(hidden, learner=learner), tokenizer, 1) as group,
        pytest.raises(
            ConfigError, match=rf"^run_dir: {hidden} is not seen on node .* choose a folder .* all nodes share$"
        ),
    ):
        assert group.place is None
        group.start()
    assert not list(hidden.iterdir())
    everywhere = asks_of(config_of())
    assert set(hosts(everywhere)) == {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    assert list(hosts([asks_of(config_of(learner=learner))[0]])) == [second_node]
    require_shared(tmp_path, list(hosts(everywhere)))


TOO_MUCH = {
    "an unknown group": ({"rollout": {"labels": {GROUP: "rolout"}}}, ["rollout.num_workers: 1", "of which 0", "rolout"]),
    "too many of a group": (
        {"judge": {"num_workers": 9, "labels": {GROUP: "learner"}}},
        ["judge.num_workers: 9", "of which 4", f"4 CPUs, 0 GPUs, {GROUP}=learner", "lower judge.num_workers"],
    ),
    "GPUs": ({"learner": {"gpus_per_rank": 1.0}}, ["learner.num_ranks: 1 with 1 CPUs and 1 GPUs", "learner.gpus_per_rank"]),
    "ranks together": (
        {"learner": {"num_ranks": 4, "cpus_per_rank": 5.0, "placement": "STRICT_PACK"}},
        ["learner.num_ranks: 4 with 5 CPUs each on one node, of which 0"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TOO_MUCH)
def test_what_the_cluster_has_no_room_for_is_refused(
    second_node: str, settled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    """In a dry run, and before a run makes its folder."""
    sections, expected = TOO_MUCH[name]
    config = config_of(tmp_path / "run", **sections, ray={"address": ray.get_runtime_context().gcs_address})
    with pytest.raises(ConfigError) as caught:
        dry_run(config)
    message = str(caught.value)
    assert "\n" not in message and "Nothing adds nodes" in message
    for text in expected:
        assert text in message
    with pytest.raises(ConfigError, match="Nothing adds nodes"):
        make_room(asks_of(config), 60.0)


def test_room_may_still_come(second_node: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An autoscaler that does not say what it can add: a dry run tells so, a run waits, but not for ever."""
    monkeypatch.setattr(placement, "grows", lambda head, nodes: True)
    config = config_of(rollout={"labels": {GROUP: "rollout"}})
    line = check_cluster(asks_of(config), None)
    assert line is not None and "More may come" in line
    with pytest.raises(
        RunStoppedError, match=r"^supervision.start_s: 1 seconds were not enough. rollout.num_workers: 1 "
    ):
        make_room(asks_of(config), 1.0)
    states = {row["state"] for row in placement_group_table().values()}
    assert states <= {"REMOVED"}
    assert check_cluster(asks_of(config_of()), None) is None


def test_a_cluster_that_does_not_answer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    line = check_cluster(asks_of(config_of()), "127.0.0.1:1")
    assert line == "the cluster at 127.0.0.1:1, which does not answer"
    with pytest.raises(ConfigError, match=r"^ray.address: nobody answers at 127.0.0.1:1 .*; ray start --head"):
        connect("127.0.0.1:1", 1.0)


def happened(scenario: str) -> list[dict[str, Any]]:
    """What a scenario of autoscaled.py printed, which is shown too."""
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-m", "tests.actors.autoscaled", scenario, folder]
        made = subprocess.run(
            ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", *command],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=1200,
        )
    print(made.stdout)
    assert made.returncode == 0, made.stderr[-3000:]
    return [json.loads(line) for line in made.stdout.splitlines() if line.startswith("{")]  # between words of Ray's


@pytest.mark.slow
def test_an_autoscaler_is_asked_for_all_at_once():
    """What it cannot add it says at once, and adds nothing; what it can is waited for."""
    too_many, enough = happened("room")
    assert too_many["nodes"] == 0 and "The autoscaler can add no nodes that make room" in too_many["said"]
    assert too_many["seconds"] < 30
    assert enough["said"] == "" and enough["nodes"] == 2


@pytest.mark.slow
def test_reward_workers_and_their_nodes_follow_the_backlog():
    """A burst adds nodes, as many as the group may have, idleness removes them, and those of the rollouts stay; a rollout
    worker whose node is lost is replaced on another, and nothing is done twice or not at all."""
    *events, done = happened("elastic")
    seen = {event.get("event"): event for event in events}
    assert seen["begin"]["judge_nodes"] == 1 and seen["begin"]["rollout_nodes"] == 2
    assert seen["burst"]["judge_nodes"] == 2 and seen["burst"]["judge_workers"] == 4
    assert seen["all that there can be"]["judge_workers"] == 4  # of five
    assert seen["workers left"]["judge_workers"] == 1 == seen["nodes left"]["judge_nodes"]
    assert seen[None]["rollout_nodes_stayed"] and seen["nodes left"]["losses"] == 0
    assert seen["node lost"]["rollout_workers"] == 1 and seen["sampled"]["losses"] == 1
    assert seen["node replaced"]["rollout_workers"] == 2
    judged = [["judge", value, value**2] for value in range(20)]
    assert done["done"] == judged + [["rollout", value, value**2] for value in range(20, 26)]
