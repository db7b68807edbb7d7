import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffrl import rollout_store
from diffrl.rollout_store import SCHEMA, read_all, read_step, write_step
from diffrl.types import Judgement, Problem, Rollout, RolloutGroup, ScoredGroup

JUDGED = Judgement(
    reward=1.5, format=1.0, pass_rate=0.5, statuses=("passed", "failed"), cpu_s=0.25, low_trust=True, detail="x\ud800",
    details=("", "y\ud800"),
)  # fmt: skip
UNJUDGED = Judgement(reward=0.0, format=0.0, pass_rate=0.0, statuses=None, cpu_s=0.0, detail="judge died")


def scored(ordinal: int, *judgements: Judgement) -> ScoredGroup:
    rollouts = tuple(
        Rollout(
            sample_index=i,
            seed=2**64 - 1 - i,
            completion_ids_C=np.array([ordinal, i, 2**31 - 1], dtype=np.int32),
            step_map_C=np.array([2, 0, 1], dtype=np.int32),
            probability_C=np.array([0.5, 0.1, np.nan], dtype=np.float16),
            num_tokens=2,
            text=f"é\x00{i}",
        )
        for i in range(len(judgements))
    )
    problem = Problem(
        id=f"p/{ordinal}",
        prompt="Do.",
        prompt_tests=("assert f()",),
        reward_tests=("assert g()", "#" * 1001),
        family="toy",
    )
    ids = np.array([1, 2], dtype=np.int32)
    group = RolloutGroup(problem=problem, ordinal=ordinal, policy_version=4, prompt_ids_P=ids, rollouts=rollouts)
    return ScoredGroup(group=group, judgements=judgements)


def test_a_step_comes_back_as_it_was(tmp_path):
    path = write_step(tmp_path / "rollouts", 12, [scored(7, JUDGED, UNJUDGED), scored(8, JUDGED)], [0.5, 0.0, -0.25])
    assert path == tmp_path / "rollouts" / "step_000012.parquet"
    table = read_step(path)
    assert table.schema.equals(SCHEMA, check_metadata=True)
    rows = table.to_pylist()
    half, tenth, unknown = rows[0].pop("probability")
    assert (half, tenth) == (0.5, np.float16(0.1)) and np.isnan(unknown)
    assert [(row["ordinal"], row["sample_index"], row["advantage"]) for row in rows] == [
        (7, 0, 0.5),
        (7, 1, 0.0),
        (8, 0, -0.25),
    ]
    assert rows[0] == {
        "step": 12,
        "ordinal": 7,
        "sample_index": 0,
        "problem_id": "p/7",
        "family": "toy",
        "prompt": "Do.\nYour code should pass this test:\nassert f()",
        "completion": "é\x000",
        "completion_ids": [7, 0, 2**31 - 1],
        "num_tokens": 2,
        "step_map": [2, 0, 1],
        "tests": ["assert g()", "#" * 1000],
        "statuses": ["passed", "failed"],
        "details": ["", "y\\ud800"],
        "reward": 1.5,
        "format": 1.0,
        "pass_rate": 0.5,
        "advantage": 0.5,
        "valid": True,
        "low_trust": True,
        "seed": 2**64 - 1,
        "policy_version": 4,
        "cpu_s": 0.25,
        "detail": "x\\ud800",
    }
    assert (rows[1]["statuses"], rows[1]["valid"], rows[1]["low_trust"]) == (None, False, False)
    assert rows[1]["detail"] == "judge died"


def test_files_are_zstd_and_carry_the_schema_version(tmp_path):
    path = write_step(tmp_path, 0, [scored(0, JUDGED)], [0.0])
    metadata = pq.read_metadata(path)
    assert {metadata.row_group(0).column(i).compression for i in range(metadata.num_columns)} == {"ZSTD"}
    assert pq.read_schema(path).metadata[b"diffrl.rollout_store.version"] == b"4"


def test_a_file_without_what_the_tests_said_is_read(tmp_path):
    """As version 3 had it."""
    path = write_step(tmp_path, 0, [scored(0, JUDGED)], [0.0])
    table = pq.read_table(path).drop_columns(["tests", "details"])
    pq.write_table(table.replace_schema_metadata({"diffrl.rollout_store.version": "3"}), path)
    (row,) = read_all(tmp_path).to_pylist()
    assert (row["tests"], row["details"], row["statuses"]) == (None, None, ["passed", "failed"])


def test_writing_a_step_again_replaces_it(tmp_path):
    write_step(tmp_path, 3, [scored(0, JUDGED)], [0.0])
    write_step(tmp_path, 3, [scored(1, JUDGED, JUDGED)], np.array([1.0, 2.0], dtype=np.float32))
    assert read_all(tmp_path)["ordinal"].to_pylist() == [1, 1]
    assert [path.name for path in tmp_path.iterdir()] == ["step_000003.parquet"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = write_step(tmp_path, 3, [scored(0, JUDGED)], [0.0])
    before = path.read_bytes()

    def broken(table, file, **options):
        file.write(b"PAR1 half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(rollout_store.pq, "write_table", broken)
    with pytest.raises(OSError, match="No space left"):
        write_step(tmp_path, 3, [scored(1, JUDGED)], [0.0])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_read_all_goes_by_step_and_skips_other_files(tmp_path):
    assert read_all(tmp_path).equals(SCHEMA.empty_table())
    for step in (1_000_000, 999_999, 2):
        write_step(tmp_path, step, [scored(step, JUDGED)], [0.0])
    (tmp_path / ".step_000004.parquet.77.partial").write_bytes(b"half a file")
    (tmp_path / "notes.txt").write_text("mine")
    table = read_all(tmp_path)
    assert table["step"].to_pylist() == [2, 999_999, 1_000_000]
    assert table.schema.equals(SCHEMA)


def test_a_step_without_rollouts_is_a_file_without_rows(tmp_path):
    assert read_step(write_step(tmp_path, 0, [], [])).num_rows == 0


def test_advantages_must_fit_the_rollouts(tmp_path):
    with pytest.raises(AssertionError):
        write_step(tmp_path, 0, [scored(0, JUDGED, JUDGED)], [0.0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "has no rollout schema version, this diffrl reads 3 and 4: use the diffrl that wrote it"),
        ({"diffrl.rollout_store.version": "1"}, "has rollout schema version 1, this diffrl reads 3 and 4"),
    ],
)
def test_other_schema_versions_are_refused(tmp_path, metadata, message):
    path = tmp_path / "step_000000.parquet"
    pq.write_table(pa.table({"step": [1]}).replace_schema_metadata(metadata), path)
    with pytest.raises(ValueError, match=message):
        read_all(tmp_path)


def test_unreadable_files_and_folders_are_named(tmp_path):
    path = tmp_path / "step_000000.parquet"
    with pytest.raises(ValueError, match=r"step_000000\.parquet cannot be read as Parquet"):
        read_step(path)
    path.write_bytes(b"PAR1 half a file")
    with pytest.raises(ValueError, match=r"step_000000\.parquet cannot be read as Parquet"):
        read_all(tmp_path)
    with pytest.raises(ValueError, match="rollouts: no folder at "):
        read_all(tmp_path / "missing")
