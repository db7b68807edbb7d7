"""`diffrl data prepare`: the rows of `supervised_shards`, made by Ray Data, however the work is spread."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.data_prepare import PrepareOptions, prepare_data
from diffrl.config import PretrainConfig, SftConfig
from diffrl.config_file import validate
from diffrl.data.rows import supervised_shards
from diffrl.data.shards import MANIFEST, open_shards
from diffrl.errors import ConfigError, RunStoppedError
from diffrl.models.loading import load_policy_tokenizer
from tests.conftest import RayCluster
from tests.diffrl.tiny_folder import tiny_folder

# Every task that runs beside others is a process of its own, which takes seconds to start.
SMALL = PrepareOptions(rows_per_file=16, unit_bytes=6000, workers=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text in all kinds of files, in several units of SMALL."""
    folder = tmp_path_factory.mktemp("source")
    lines = [f"def f{n}(x):\n    return x + {n}\n" * (1 + n % 7) for n in range(300)]
    for n, text in enumerate(lines[:20]):
        (folder / f"{n:02d}.py").write_text(text)
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines[20:200]))
    pq.write_table(pa.table({"text": lines[200:]}), folder / "b.parquet", row_group_size=10)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


def config_of(stage: str, model: Path, **data) -> PretrainConfig | SftConfig:
    config = validate({"stage": stage, "model": {"path": str(model)}, "data": data}, "test")
    assert isinstance(config, PretrainConfig | SftConfig)
    return config


def files_of(folder: Path) -> dict[str, list]:
    return {name: pq.read_table(folder / name).to_pylist() for name in open_shards(folder).files}


def test_the_rows_do_not_depend_on_who_makes_them(
    ray_cluster: RayCluster, source: Path, model: Path, tmp_path: Path, capsys
):
    config = config_of("pretrain", model, source="text", path=str(source), sequence_length=64)
    many = prepare_data(config, tmp_path / "many", SMALL)
    said = capsys.readouterr().out
    one = prepare_data(config, tmp_path / "one", replace(SMALL, workers=1))
    assert replace(one, source="") == replace(many, source="") and len(many.files) > 5
    assert files_of(tmp_path / "one") == files_of(tmp_path / "many")
    assert sorted(p.name for p in (tmp_path / "many").iterdir()) == [*many.files, MANIFEST]
    assert said.startswith(f"data: {many.num_rows} rows, {many.num_tokens} tokens, {len(many.files)} files in ")
    assert f"fingerprint {many.fingerprint[:16]} -> {tmp_path / 'many'}" in said
    tokens = sum(len(row["ids"]) for rows in files_of(tmp_path / "many").values() for row in rows)
    assert many.num_tokens == tokens > 5000


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_they_are_those_of_a_stage_that_prepares_its_own(
    ray_cluster: RayCluster, source: Path, model: Path, tmp_path: Path, stage: str
):
    data = {"source": "text", "path": str(source), "sequence_length": 64}
    if stage == "sft":
        pairs = "".join(json.dumps({"prompt": f"add {n}", "completion": f"x + {n}"}) + "\n" for n in range(50))
        (tmp_path / "a.jsonl").write_text(pairs)
        data = {"source": "files", "path": str(tmp_path / "a.jsonl"), "layout": "packed", "sequence_length": 64}
    config = config_of(stage, model, **data)
    prepared = prepare_data(config, tmp_path / "prepared", PrepareOptions(rows_per_file=16, workers=1))
    tokenizer = load_policy_tokenizer(config.model)
    own = supervised_shards(config, tokenizer, tmp_path / "own", rows_per_file=16)
    assert replace(open_shards(own), source="") == replace(prepared, source="")
    assert files_of(own) == files_of(tmp_path / "prepared")
    shards = config_of(stage, model, source="shards", path=str(tmp_path / "prepared"))
    assert supervised_shards(shards, tokenizer, tmp_path / "unused") == tmp_path / "prepared"
    with pytest.raises(ConfigError, match="holds shards already"):
        prepare_data(shards, tmp_path / "again")


def test_a_folder_is_kept_or_refused(ray_cluster: RayCluster, source: Path, model: Path, tmp_path: Path, capsys):
    config = config_of("pretrain", model, source="text", path=str(source / "00.py"), sequence_length=16)
    first = prepare_data(config, tmp_path / "rows", PrepareOptions(workers=1))
    assert "(kept" not in capsys.readouterr().out
    assert prepare_data(config, tmp_path / "rows") == first
    assert capsys.readouterr().out.endswith("(kept: made from the same inputs)\n")
    other = config_of("pretrain", model, source="text", path=str(source / "00.py"), sequence_length=17)
    with pytest.raises(ConfigError, match=r"rows holds rows of other inputs .* name another folder"):
        prepare_data(other, tmp_path / "rows")
    assert open_shards(tmp_path / "rows") == first


def test_bad_data_are_named_and_leave_nothing(
    ray_cluster: RayCluster, source: Path, model: Path, tmp_path: Path, capsys
):
    (tmp_path / "a.jsonl").write_text('{"text": "x + 1"}\n' * 200 + "{\n" + '{"text": "x + 2"}\n')
    data = {"source": "text", "path": str(tmp_path), "sequence_length": 64}
    with pytest.raises(ConfigError, match=r"a\.jsonl line 201 is not JSON .* set data\.bad_files: skip"):
        prepare_data(config_of("pretrain", model, **data), tmp_path / "rows", SMALL)
    assert list((tmp_path / "rows").iterdir()) == []
    prepare_data(config_of("pretrain", model, **data, bad_files="skip"), tmp_path / "rows", SMALL)
    assert capsys.readouterr().out.startswith(
        f"data: 1 damaged and left out: {tmp_path / 'a.jsonl'} line 201 is not JSON"
    )
    assert sum(row["ids"].count(1) for rows in files_of(tmp_path / "rows").values() for row in rows) == 201


def test_a_full_disk_is_one_line_and_leaves_nothing(ray_cluster: RayCluster, source: Path, model: Path, tmp_path: Path):
    """The first file's name is known from an undisturbed run; writing there fails as on a full disk."""
    from actors import data_prepare

    config = config_of("pretrain", model, source="text", path=str(source / "00.py"), sequence_length=16)
    rows = files_of(supervised_shards(config, load_policy_tokenizer(config.model), tmp_path / "own"))
    table = pa.Table.from_pylist([{"key": 7} | row for row in rows["00000.parquet"]])
    folder = tmp_path / "rows"
    folder.mkdir()
    os.symlink("/dev/full", folder / f"{data_prepare.temporary_name(7)}.part")
    report = data_prepare.write_block(table, folder=folder).to_pylist()
    with pytest.raises(RunStoppedError, match=f"{folder}: no space left on the disk for key-"):
        data_prepare.close_folder(folder, report, {}, 16)
    assert list(folder.iterdir()) == []
