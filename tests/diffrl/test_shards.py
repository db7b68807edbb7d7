"""Folders of rows: the stream of epochs, where it resumes, what is held out, and what is wrong with a folder."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffrl.data.shard_writer import ShardWriter
from diffrl.data.shards import MANIFEST, Manifest, Row, held_out_rows, open_shards, read_part, training_parts
from diffrl.data.shards import kept_sizes as kept
from diffrl.errors import ConfigError

FACTS = {"kind": "text", "length": 3, "pad_token_id": 0, "vocab_size": 1000, "source": "test"}


def folder_of(path: Path, num_rows: int, rows_per_file: int = 4) -> Manifest:
    """Rows that differ: row n holds the tokens n and n + 1."""
    with ShardWriter(path, **FACTS, rows_per_file=rows_per_file) as writer:
        writer.add(Row(ids=[n, n + 1], lengths=[2], prompts=[n % 2]) for n in range(num_rows))
    return open_shards(path)


def stream(path: Path, manifest: Manifest, *, seed: int = 0, first: int, stop: int, held_out: int = 0) -> list[int]:
    sizes = kept(manifest, held_out)
    parts = training_parts(manifest, seed=seed, first=first, stop=stop, held_out=held_out)
    return [row.ids[0] for part in parts for row in read_part(path, part, num_kept=sizes[part.file])]


def test_rows_are_read_as_they_were_written(tmp_path: Path):
    rows = [
        Row(ids=[0, 7, 5, 9, 1, 0], lengths=[5], prompts=[2], left=1, fill=1),
        Row(ids=[3, 1, 4], lengths=[2, 1], prompts=[0, 1]),
        Row(ids=[2], lengths=[1], prompts=[0]),
    ]
    with ShardWriter(tmp_path, **FACTS, inputs="abc", notes=["one"], rows_per_file=2) as writer:
        writer.add(rows)
    manifest = open_shards(tmp_path)
    assert held_out_rows(tmp_path, manifest, 3) == rows
    assert manifest.files == {"00000.parquet": 2, "00001.parquet": 1}
    assert (manifest.num_rows, manifest.num_tokens, manifest.inputs, manifest.notes) == (3, 8, "abc", ["one"])


def test_the_fingerprint_is_of_every_number_of_every_row(tmp_path: Path):
    row = {"ids": [5, 6, 7], "lengths": [2, 1], "prompts": [1, 0], "left": 0, "fill": 0}
    changes = [{}, {"ids": [5, 6, 8]}, {"lengths": [1, 2]}, {"prompts": [0, 0]}, {"left": 1}, {"fill": 1}]
    seen = set()
    for number, change in enumerate(changes):
        with ShardWriter(tmp_path / str(number), **FACTS) as writer:
            writer.add([Row(**row), Row(**(row | change))])
        seen.add(open_shards(tmp_path / str(number)).fingerprint)
    assert len(seen) == len(changes)
    with ShardWriter(tmp_path / "again", **FACTS) as writer:
        writer.add([Row(**row), Row(**row)])
    assert open_shards(tmp_path / "again").fingerprint in seen


@settings(deadline=None)
@given(
    num_rows=st.integers(1, 30),
    rows_per_file=st.integers(1, 9),
    held=st.integers(0, 29),
    seed=st.integers(0, 5),
    cut=st.integers(0, 99),
)
def test_every_epoch_is_a_permutation_and_resumes_anywhere(
    tmp_path_factory: pytest.TempPathFactory, num_rows: int, rows_per_file: int, held: int, seed: int, cut: int
):
    """Of the rows that are not held out, and from any row on the stream is the undisturbed one's."""
    path, held = tmp_path_factory.mktemp("rows"), min(held, num_rows - 1)
    manifest = folder_of(path, num_rows, rows_per_file)
    total = num_rows - held
    whole = stream(path, manifest, seed=seed, first=0, stop=3 * total, held_out=held)
    for epoch in range(3):
        assert sorted(whole[epoch * total : (epoch + 1) * total]) == list(range(total))
    cut %= 3 * total
    assert stream(path, manifest, seed=seed, first=cut, stop=3 * total, held_out=held) == whole[cut:]
    assert stream(path, manifest, seed=seed, first=0, stop=cut, held_out=held) == whole[:cut]
    assert [row.ids[0] for row in held_out_rows(path, manifest, held)] == list(range(total, num_rows))


def test_epochs_and_seeds_differ(tmp_path: Path):
    manifest = folder_of(tmp_path, 40)
    epochs = [tuple(stream(tmp_path, manifest, first=n * 40, stop=n * 40 + 40)) for n in range(3)]
    others = [tuple(stream(tmp_path, manifest, seed=seed, first=0, stop=40)) for seed in (1, 2)]
    assert len({*epochs, *others, tuple(range(40))}) == 6
    files = [[row // 4 for row in epoch[::4]] for epoch in epochs]
    assert all(sorted(order) == list(range(10)) for order in files)  # one file after the other
    assert files[0] != files[1] != files[2]


def test_resuming_opens_the_files_from_there_on_only(tmp_path: Path):
    manifest = folder_of(tmp_path, 40)
    parts = list(training_parts(manifest, seed=0, first=30, stop=40))
    assert [(part.first, part.stop) for part in parts] == [(2, 4), (0, 4), (0, 4)]


def test_what_is_wrong_with_a_folder_is_named(tmp_path: Path):
    folder_of(tmp_path, 20)
    (tmp_path / "00001.parquet").unlink()
    (tmp_path / "00003.parquet").write_bytes((tmp_path / "00003.parquet").read_bytes()[:-20])
    with pytest.raises(ConfigError) as refused:
        open_shards(tmp_path)
    assert "00001.parquet, 00003.parquet are missing or damaged, the other 3 files are whole" in str(refused.value)
    raw = json.loads((tmp_path / MANIFEST).read_text())
    cases = {
        "schema_version 99": json.dumps(raw | {"schema_version": 99}),
        "cannot be read": json.dumps(raw)[:50],
        "cannot be read (": json.dumps({k: v for k, v in raw.items() if k != "length"}),
        "holds no rows": json.dumps(raw | {"files": {}}),
    }
    for expected, text in cases.items():
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(ConfigError) as refused:
            open_shards(tmp_path)
        assert expected in str(refused.value) and str(tmp_path) in str(refused.value)
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(ConfigError, match=r"holds no manifest\.json; write it with `diffrl data prepare`"):
        open_shards(tmp_path)


def test_an_error_while_writing_leaves_no_rows(tmp_path: Path):
    def rows():
        yield from [Row(ids=[1], lengths=[1], prompts=[0])] * 5
        raise KeyError("of the source")

    with pytest.raises(KeyError), ShardWriter(tmp_path, **FACTS, rows_per_file=2) as writer:
        writer.add(rows())
    assert list(tmp_path.iterdir()) == []
