"""The rollout board over a million rollouts: `make bench-board`. Goals: the first page within 2 s, any filter within 3 s, memory
of the server below 500 MB.

The rollouts are small programs with random rewards, statuses, lengths and orders, in 20 files of 50,000 rows. The server is the
`diffrl board` command in a process of its own; what is measured is the time of whole requests from here. Every filter is asked
for while nothing is remembered of it, first while the server looks at texts in the background, then when it is done.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from diffrl.rollout_store import SCHEMA, step_file

FILES, STEPS_PER_FILE, ROWS_PER_STEP = 20, 50, 1_000
ROWS = FILES * STEPS_PER_FILE * ROWS_PER_STEP
GROUP, WINDOW, PROBLEMS = 10, 64, 5_000
FIRST_PAGE_S, FILTER_S, MEMORY_MB = 2.0, 3.0, 500
STATUSES = ("passed", "failed", "error", "timeout")
FILTERS = {
    "verdict": "verdict=passed",
    "part of a name": "problem=ab/12",
    "reward and order": "reward_min=1&sort=reward&dir=asc",
    "low trust": "trust=low&sort=length&dir=desc",
    "ranges": "step_min=300&step_max=800&staleness_min=1&length_max=20",
    "by name": "sort=problem&dir=asc",
    "by verdict": "sort=verdict&dir=asc&verdict=failed,error",
    "suspicious": "flag=any",
    "the last page": "sort=advantage&dir=desc&page=1000000",
}


def write_file(folder: Path, number: int) -> None:
    rng = np.random.default_rng(number)
    size = STEPS_PER_FILE * ROWS_PER_STEP
    step = np.repeat(np.arange(STEPS_PER_FILE) + number * STEPS_PER_FILE, ROWS_PER_STEP)
    ordinal = np.repeat(np.arange(size // GROUP) + number * size // GROUP, GROUP)
    statuses = rng.choice(4, (size, 4), p=[0.5, 0.3, 0.15, 0.05])
    pass_rate = (statuses == 0).mean(1)
    numbers = rng.integers(0, 100, (size, 2)).tolist()
    texts = [
        f"```python\ndef f(x):\n    y = x * {a} + {b}\n    return y if x > {b} else x - {a}\n```" for a, b in numbers
    ]
    steps = rng.permuted(np.tile(np.arange(WINDOW, dtype=np.int32), (size, 1)), axis=1)
    offsets = pa.array(np.arange(size + 1, dtype=np.int32) * WINDOW)

    def lists(values: np.ndarray, kind: str) -> pa.Array:
        return pa.ListArray.from_arrays(offsets, pa.array(values.ravel()), type=SCHEMA.field(kind).type)

    valid = rng.random(size) > 0.01
    columns = {
        "step": step,
        "ordinal": ordinal,
        "sample_index": np.tile(np.arange(GROUP), size // GROUP),
        "problem_id": [f"lab/{n}" for n in (ordinal * 7919 % PROBLEMS).tolist()],
        "family": ["linear"] * size,
        "prompt": [
            f"Write f(x).\nYour code should pass this test:\nassert f({n % 97}) == {n}" for n in ordinal.tolist()
        ],
        "completion": texts,
        "completion_ids": lists(rng.integers(0, 1000, (size, WINDOW), dtype=np.int32), "completion_ids"),
        "num_tokens": rng.integers(10, WINDOW, size),
        "step_map": lists(steps, "step_map"),
        "probability": lists(rng.random((size, WINDOW)).astype(np.float16), "probability"),
        "statuses": [
            [STATUSES[n] for n in row] if ok else None for row, ok in zip(statuses.tolist(), valid, strict=True)
        ],
        "reward": np.where(valid, 2 * pass_rate + 0.5, 0),
        "format": np.ones(size),
        "pass_rate": pass_rate,
        "advantage": rng.normal(size=size),
        "valid": valid,
        "low_trust": rng.random(size) < 0.01,
        "seed": rng.integers(0, 2**63, size),
        "policy_version": np.maximum(0, step - rng.integers(0, 3, size)),
        "cpu_s": rng.random(size),
        "detail": [""] * size,
    }
    arrays = [v if isinstance(v, pa.Array) else pa.array(v, SCHEMA.field(name).type) for name, v in columns.items()]
    pq.write_table(pa.Table.from_arrays(arrays, schema=SCHEMA), step_file(folder, number), row_group_size=10_000)


class Server:
    """`diffrl board` in a process of its own."""

    def __init__(self, folder: Path):
        self.began = time.perf_counter()
        command = [sys.executable, "-m", "actors.cli", "board", str(folder), "--port", "0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    def ask(self, path: str) -> tuple[dict, float]:
        began = time.perf_counter()
        with urllib.request.urlopen(f"{self.url}{path}", timeout=600) as answer:
            body = answer.read()
        return json.loads(body) if path.startswith("api/") else {}, time.perf_counter() - began

    def memory_mb(self) -> float:
        return psutil.Process(self.process.pid).memory_info().rss / 2**20

    def peak_mb(self) -> float:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:"))

    def state(self) -> dict:
        return self.ask("api/state")[0]["runs"][0]

    def since_start(self) -> float:
        return time.perf_counter() - self.began


def ask_all(server: Server) -> float:
    """The slowest of all filters, in seconds."""
    slowest = 0.0
    for name, query in FILTERS.items():
        answer, seconds = server.ask(f"api/rollouts?{query}&size=50")
        slowest = max(slowest, seconds)
        print(f"  {name:<20}{seconds:6.2f} s   {answer['total']:>9,} rollouts")
    return slowest


def main() -> None:
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text) / "run"
        (folder / "rollouts").mkdir(parents=True)
        (folder / "run.json").write_text("{}")
        began = time.perf_counter()
        for number in range(FILES):
            write_file(folder / "rollouts", number)
        size = sum(file.stat().st_size for file in (folder / "rollouts").iterdir())
        print(
            f"{ROWS:,} rollouts, {FILES} files, {size / 2**20:,.0f} MiB, written in {time.perf_counter() - began:.0f} s"
        )
        print(f"machine: {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
        server = Server(folder)
        try:
            measure(server)
        finally:
            server.process.terminate()
            server.process.wait(60)


def measure(server: Server) -> None:
    server.ask("")
    print(f"from the command to its first answer: {server.since_start():.2f} s")
    while server.state()["read"] == 0:
        time.sleep(0.02)
    server.ask("api/rollouts")
    print(f"from the command to a page of rollouts, of the files read by then: {server.since_start():.2f} s")
    while server.state()["read"] < FILES:
        time.sleep(0.1)
    while server.state()["rollouts"] < ROWS:
        time.sleep(0.1)
    print(f"from the command to all {ROWS:,} rollouts: {server.since_start():.2f} s")
    first = sum(server.ask(path)[1] for path in ("", "api/state", "api/rollouts"))
    print(f"first page of all rollouts (page, state, table): {first:.2f} s")
    print("filters, while texts are looked at:")
    busy = ask_all(server)
    while server.state()["unscanned"]:
        time.sleep(0.5)
    time.sleep(1.5)  # the last snapshot
    print(f"from the command to all texts looked at: {server.since_start():.0f} s")
    print("filters:")
    slowest = ask_all(server)
    key = server.ask("api/rollouts?page=7000")[0]["rows"][0]["key"].split("/")
    rollout = server.ask("api/rollout?step={}&ordinal={}&sample={}".format(*key))[1]
    others = {name: server.ask(f"api/{name}")[1] for name in ("problems", "orders", "problem?id=lab/12")}
    print(f"one rollout with its siblings: {rollout:.2f} s; " + "; ".join(f"{k}: {v:.2f} s" for k, v in others.items()))
    memory, peak = server.memory_mb(), server.peak_mb()
    print(f"memory of the server: {memory:.0f} MB now, {peak:.0f} MB at most")
    goals = {
        "first page": (first, FIRST_PAGE_S),
        "slowest filter": (max(slowest, busy), FILTER_S),
        "memory": (peak, MEMORY_MB),
    }
    for name, (found, limit) in goals.items():
        print(f"{name}: {found:.2f}, goal {limit:g}: {'kept' if found < limit else 'MISSED'}")


if __name__ == "__main__":
    main()
