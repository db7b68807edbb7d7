"""Counters of a supervisor over HTTP, as Prometheus reads them."""

import socket
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sandbox.judge import metrics

STATS = {"judged": 7, "errors": 1, "slots_started": 5, "busy": 3, "waiting": 2, "slots": 4, "draining": 0}


def read(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {
        sample.name.removeprefix("diffrl_sandbox_"): sample.value for family in families for sample in family.samples
    }


def test_prometheus_reads_every_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "from_inside", lambda peer, own: False)  # the reader is on this machine
    stats = dict(STATS)
    port = metrics.serve("127.0.0.1:0", lambda: stats)
    first = {"judged_total": 7, "errors_total": 1, "slots_started_total": 5, "busy": 3, "waiting": 2, "slots": 4}
    assert read(port) == first | {"draining": 0}
    stats |= {"judged": 10, "busy": 0, "waiting": 0, "draining": 1}
    assert read(port) == first | {"judged_total": 10, "busy": 0, "waiting": 0, "draining": 1}


def test_who_says_nothing_is_not_waited_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "from_inside", lambda peer, own: False)
    monkeypatch.setattr(metrics, "_PATIENCE_S", 0.1)
    port = metrics.serve("127.0.0.1:0", lambda: STATS)
    with socket.create_connection(("127.0.0.1", port), timeout=30):
        assert read(port)["busy"] == 3


def test_programs_of_the_container_are_hung_up_on() -> None:
    port = metrics.serve("0.0.0.0:0", lambda: STATS)
    for source in ("127.0.0.1", "127.0.0.2"):
        with socket.create_connection(("127.0.0.1", port), timeout=30, source_address=(source, 0)) as sock:
            assert sock.recv(1) == b""


@pytest.mark.parametrize(
    ("peer", "own", "inside"),
    [
        ("10.1.0.7", "10.1.0.7", True),
        ("::1", "::1", True),
        ("10.1.0.8", "10.1.0.7", False),
        ("12.7.0.1", "10.1.0.7", False),
    ],
)
def test_a_program_is_known_by_its_address(peer: str, own: str, inside: bool) -> None:
    assert metrics.from_inside(peer, own) is inside
