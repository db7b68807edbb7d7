"""From sources to rows: layouts by hand, packing, every way in which data can be wrong, and that nothing depends on how it
is cut up for work."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffrl.config import PretrainConfig, SftConfig
from diffrl.config_file import validate
from diffrl.data.pack import Piece, pack, padded_row, text_rows, window_row
from diffrl.data.records import Chat, Document, Place
from diffrl.data.rows import check_lengths, encode, make_rows, supervised_shards
from diffrl.data.shard_writer import ShardWriter
from diffrl.data.shards import MANIFEST, Row, collate, held_out_rows, open_shards
from diffrl.data.units import Unit, read_unit, units_of
from diffrl.errors import ConfigError, RunStoppedError
from diffrl.prompts import chat_ids
from diffrl.types import Problem
from tests.diffrl.tiny_folder import tiny_tokenizer

END, PAD = 1, 0
PAIRS = [{"prompt": f"add {n}", "completion": f"x + {n}"} for n in range(30)]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def config_of(stage: str, **data) -> PretrainConfig | SftConfig:
    config = validate({"stage": stage, "data": data}, "test")
    assert isinstance(config, PretrainConfig | SftConfig)
    return config


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def all_rows(folder: Path) -> list[Row]:
    manifest = open_shards(folder)
    return held_out_rows(folder, manifest, manifest.num_rows)


def test_window_layout_by_hand():
    rows = [window_row(p, c, prompt_length=3, length=7, pad=PAD) for p, c in (([5, 6], [7, 8, END]), ([5], [9, END]))]
    batch = collate(rows, length=7, pad_token_id=PAD, pad_weight=0.25)
    assert batch.ids_NL.tolist() == [[PAD, 5, 6, 7, 8, END, PAD], [PAD, PAD, 5, 9, END, PAD, PAD]]
    assert batch.document_NL.tolist() == [[0, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]]
    assert batch.maskable_NL.int().tolist() == [[0, 0, 0, 1, 1, 1, 1]] * 2
    assert batch.loss_weight_NL.tolist() == [[0, 0, 0, 1, 1, 1, 0.25], [0, 0, 0, 1, 1, 0.25, 0.25]]


def test_padded_layout_by_hand():
    batch = collate([padded_row([5, 6], [7, END], length=6, pad=PAD)], length=6, pad_token_id=PAD, pad_weight=0.5)
    assert batch.ids_NL.tolist() == [[5, 6, 7, END, PAD, PAD]]
    assert batch.document_NL.tolist() == [[1] * 6]
    assert batch.loss_weight_NL.tolist() == [[0, 0, 1, 1, 0.5, 0.5]]


def test_packing_by_hand():
    """Best fit: [9] goes to the row with room for exactly one, not to the first one."""
    rows = pack([Piece([5, 6, 7], 1), Piece([4, 3, 2, 1], 2), Piece([9]), Piece([8, 8])], 5)
    assert [row.ids for row in rows] == [[5, 6, 7, 8, 8], [4, 3, 2, 1, 9]]
    assert [(row.lengths, row.prompts, row.left, row.fill) for row in rows] == [
        ([3, 2], [1, 0], 0, 0),
        ([4, 1], [2, 0], 0, 0),
    ]
    batch = collate(rows, length=6, pad_token_id=PAD, pad_weight=1.0)
    assert batch.document_NL.tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 2, 0]]
    assert batch.maskable_NL.int().tolist() == [[0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0]]


@given(st.lists(st.lists(st.integers(2, 9), max_size=12), max_size=20), st.integers(1, 6))
def test_packing_keeps_every_token_and_cuts_only_what_is_too_long(documents: list[list[int]], length: int):
    rows = text_rows(documents, length, end_token_id=END)
    pieces = [
        row.ids[sum(row.lengths[:i]) : sum(row.lengths[: i + 1])] for row in rows for i in range(len(row.lengths))
    ]
    expected = [ids[i : i + length] for d in documents for ids in [[*d, END]] for i in range(0, len(ids), length)]
    assert sorted(map(tuple, pieces)) == sorted(map(tuple, expected))
    assert all(0 < len(row.ids) <= length and sum(row.lengths) == len(row.ids) for row in rows)
    sizes = sorted(len(row.ids) for row in rows)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > length  # two rows that fit into one would be one


def test_a_chat_is_laid_out_as_rollouts_will_ask_it(tokenizer):
    problem = Problem(id="1", prompt="add one", prompt_tests=(), reward_tests=("assert True",))
    config = config_of("sft", source="microcode", max_prompt_tokens=30, completion_tokens=20)
    system = {"role": "system", "content": "Be short."}
    turns = [{"role": "user", "content": "add one"}]
    chats = [Chat(place=Place("x:"), messages=m, completion="x + 1") for m in (turns, [system, *turns])]
    rows = make_rows(Unit(number=0, records=chats), config, tokenizer).rows
    prompt, completion = chat_ids(tokenizer, problem), tokenizer("x + 1")["input_ids"]
    row = rows[0]
    assert row.ids[row.left : 30] == prompt and row.ids[30 : 50 - row.fill] == [*completion, tokenizer.eos_token_id]
    assert row.prompts == [len(prompt)] and row.left == 30 - len(prompt) and row.fill == 20 - len(completion) - 1
    assert tokenizer.decode(rows[1].ids[rows[1].left : 30]).count("Be short.") == 1


@pytest.mark.parametrize("layout", ["window", "padded", "packed"])
def test_instructions_come_back_from_every_layout(tokenizer, tmp_path: Path, layout: str):
    """Every pair once, its prompt given and its completion closed; the same from JSONL, Parquet and a data set."""
    chats = [{"messages": [{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": p["completion"]}]}
             for p in PAIRS]  # fmt: skip
    files = {"a.jsonl": PAIRS, "b.jsonl": chats}
    paths = [jsonl(tmp_path / name, rows) for name, rows in files.items()] + [tmp_path / "c.parquet"]
    pq.write_table(pa.Table.from_pylist(chats), paths[-1])
    (tmp_path / "hub").mkdir()
    jsonl(tmp_path / "hub/train.jsonl", PAIRS)
    seen = []
    sizes = {"layout": layout, "max_prompt_tokens": 24, "completion_tokens": 16, "sequence_length": 80}
    for number, (source, path) in enumerate([*(("files", p) for p in paths), ("hub", tmp_path / "hub")]):
        config = config_of("sft", source=source, path=str(path), **sizes)
        seen.append(all_rows(supervised_shards(config, tokenizer, tmp_path / f"out{number}")))
    assert seen[0] == seen[1] == seen[2] == seen[3]
    found = []
    for row in seen[0]:
        start = row.left
        for number, (size, asked) in enumerate(zip(row.lengths, row.prompts, strict=True)):
            stop = start + size - (row.fill if number == len(row.lengths) - 1 else 0)
            assert row.ids[stop - 1] == tokenizer.eos_token_id
            found.append(
                (tokenizer.decode(row.ids[start : start + asked]), tokenizer.decode(row.ids[start + asked : stop - 1]))
            )
            start += size
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": p["prompt"]}], tokenize=False,
                                             add_generation_prompt=True) for p in PAIRS]  # fmt: skip
    assert sorted(found) == sorted((q, p["completion"]) for q, p in zip(prompts, PAIRS, strict=True))
    assert (len(seen[0]) < len(PAIRS)) == (layout == "packed")


def test_text_from_all_kinds_of_files(tokenizer, tmp_path: Path):
    source = tmp_path / "source"
    (source / "deeper").mkdir(parents=True)
    (source / "a.txt").write_text("x + 1")
    (source / "deeper/b.py").write_text("x + 2")
    (source / "ignored.bin").write_text("x + 9")
    jsonl(source / "c.jsonl", [{"text": "x + 3"}, {"text": "x\u2028+ 4"}, {"text": " "}])
    pq.write_table(pa.table({"text": ["x + 5"], "other": [1]}), source / "d.parquet")
    config = config_of("pretrain", source="text", path=str(source), sequence_length=64)
    rows = all_rows(supervised_shards(config, tokenizer, tmp_path / "rows"))
    texts = [text for row in rows for text in tokenizer.decode(row.ids).split("<|im_end|>") if text]
    assert sorted(texts) == sorted(["x + 1", "x + 2", "x + 3", "x\u2028+ 4", "x + 5"])


def test_microcode_documents_are_programs_and_files(tokenizer, tmp_path: Path):
    config = config_of("pretrain", source="microcode", max_stdlib_bytes=30_000, sequence_length=256)
    folder = supervised_shards(config, tokenizer, tmp_path / "rows")
    manifest, rows = open_shards(folder), all_rows(folder)
    ends = sum(list(row.ids).count(tokenizer.eos_token_id) for row in rows)
    (unit,) = units_of(config.data, seed=0)
    assert ends == len(unit.records) > 3000
    assert manifest.num_tokens == sum(len(row.ids) for row in rows) > 0.9 * 256 * len(rows)


def test_special_tokens_in_text_stay_text(tokenizer):
    """Else a document could hold the mask token, or an end before its end."""
    (ids,) = encode(tokenizer, ["a <|mask|> b <|im_end|>"])
    assert not {tokenizer.mask_token_id, tokenizer.eos_token_id} & set(ids)
    assert tokenizer.decode(ids) == "a <|mask|> b <|im_end|>"


def test_rows_depend_on_seed_and_data_alone(tokenizer, tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", PAIRS)
    base = {"source": "files", "path": str(path), "max_prompt_tokens": 24, "completion_tokens": 16}
    first = supervised_shards(config_of("sft", **base), tokenizer, tmp_path / "1", rows_per_file=8)
    again = supervised_shards(config_of("sft", **base), tokenizer, tmp_path / "2", rows_per_file=8)
    assert open_shards(first) == open_shards(again) and len(open_shards(first).files) == 4
    config = validate({"stage": "sft", "seed": 1, "data": base}, "test")
    assert isinstance(config, SftConfig)
    other = supervised_shards(config, tokenizer, tmp_path / "3")
    assert open_shards(other).fingerprint != open_shards(first).fingerprint
    assert sorted(map(str, all_rows(other))) == sorted(map(str, all_rows(first)))
    ordered = make_rows(units_of(config.data, seed=0)[0], config, tokenizer).rows
    assert list(ordered) != all_rows(first)  # shuffled


@given(st.integers(1, 400))
def test_units_cut_no_line(tokenizer, tmp_path_factory: pytest.TempPathFactory, unit_bytes: int):
    """However small the units: every record once, in order."""
    folder = tmp_path_factory.mktemp("units")
    jsonl(folder / "a.jsonl", [{"text": "é" * n} for n in range(1, 12)])
    (folder / "b.txt").write_text("plain")
    pq.write_table(pa.table({"text": [f"row {n}" for n in range(9)]}), folder / "c.parquet", row_group_size=2)
    config = config_of("pretrain", source="text", path=str(folder), sequence_length=64)
    units = units_of(config.data, seed=0, unit_bytes=unit_bytes)
    assert [unit.number for unit in units] == list(range(len(units)))
    texts = [r.text for unit in units for r in records_of(unit) if isinstance(r, Document)]
    assert texts == ["é" * n for n in range(1, 12)] + ["plain"] + [f"row {n}" for n in range(9)]


def records_of(unit: Unit):
    records, faults = read_unit(unit, chats=False)
    assert not faults.counts
    return records


def test_a_finished_folder_is_kept_and_another_one_refused(tokenizer, tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "x + 1"}])
    config = config_of("pretrain", source="text", path=str(path), sequence_length=16)
    folder = supervised_shards(config, tokenizer, tmp_path / "rows")
    written = (folder / "00000.parquet").stat().st_mtime_ns
    path.rename(tmp_path / "moved.jsonl")
    moved = config_of("pretrain", source="text", path=str(tmp_path / "moved.jsonl"), sequence_length=16)
    assert supervised_shards(moved, tokenizer, folder) == folder
    assert (folder / "00000.parquet").stat().st_mtime_ns == written
    jsonl(tmp_path / "moved.jsonl", [{"text": "x + 2"}])
    with pytest.raises(ConfigError, match=r"other inputs .*name another folder"):
        supervised_shards(moved, tokenizer, folder)


def test_what_was_cut_off_is_written_again_and_strangers_are_left_alone(tokenizer, tmp_path: Path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "x + 1"}])
    config = config_of("pretrain", source="text", path=str(path), sequence_length=16)
    folder = supervised_shards(config, tokenizer, tmp_path / "rows")
    (folder / MANIFEST).rename(folder / f"{MANIFEST}.part")  # as a kill leaves it
    (folder / "00007.parquet").write_bytes(b"half")
    assert list(open_shards(supervised_shards(config, tokenizer, folder)).files) == ["00000.parquet"]
    assert sorted(p.name for p in folder.iterdir()) == ["00000.parquet", MANIFEST]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.parquet").write_text("years")
    with pytest.raises(ConfigError, match=r"mine is not empty: it holds thesis\.parquet; name a new folder"):
        supervised_shards(config, tokenizer, tmp_path / "mine")
    assert (tmp_path / "mine/thesis.parquet").read_text() == "years"


LONG = [{"prompt": "add " + "1 " * 30, "completion": "x"}, {"prompt": "add", "completion": "x + 1 " * 30}]


@pytest.mark.parametrize("layout", ["window", "padded", "packed"])
def test_rows_that_are_too_long(tokenizer, tmp_path: Path, capsys, layout: str):
    path = jsonl(tmp_path / "a.jsonl", [*PAIRS[:2], *LONG])
    sizes = {"layout": layout, "max_prompt_tokens": 24, "completion_tokens": 16, "sequence_length": 40}
    config = config_of("sft", source="files", path=str(path), **sizes)
    with pytest.raises(ConfigError) as refused:
        supervised_shards(config, tokenizer, tmp_path / "rows")
    line = str(refused.value)
    prompt, completion = (len(ids) for ids in encode(tokenizer, [LONG[1]["prompt"], LONG[1]["completion"]]))
    room = "max_prompt_tokens 24 and completion_tokens 16" if layout == "window" else "sequence_length 40"
    assert f"{path} line 3 has" in line and "data.too_long: drop" in line and "\n" not in line
    given = prompt + len(encode(tokenizer, ["<|im_start|>user\n<|im_end|><|im_start|>assistant\n"], special=True)[0])
    said = f"{path} line 4 has {given} prompt tokens and {completion + 1} completion tokens with the end token"
    assert f"{said}, more than {room}" in line
    assert not (tmp_path / "rows").exists()
    dropping = config_of("sft", source="files", path=str(path), too_long="drop", **sizes)
    folder = supervised_shards(dropping, tokenizer, tmp_path / "rows")
    assert sum(len(row.lengths) for row in all_rows(folder)) == 2
    (note,) = open_shards(folder).notes
    assert note.startswith(f"2 too long and left out: {path} line 3 has ") and note in capsys.readouterr().err


def damaged(path: Path) -> Path:
    """A Parquet file whose footer is right and whose data are not."""
    pq.write_table(pa.table({"text": ["x + 3 " * 200] * 50}), path, write_page_checksum=True, use_dictionary=False)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3 : len(raw) // 3 + 8] = b"\xff" * 8
    path.write_bytes(raw)
    return path


def test_damaged_files_are_named_and_the_others_are_not_lost(tokenizer, tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    pq.write_table(pa.table({"text": ["x + 1"]}), source / "good.parquet")
    damaged(source / "pages.parquet")
    (source / "footer.parquet").write_bytes((source / "good.parquet").read_bytes()[:-9])
    (source / "lines.jsonl").write_bytes(b'{"text": "x + 2"}\n\n{"text": \n{"text": "\xff"}\n{"text": "x + 4"}\n')
    (source / "nothing.txt").write_text("")
    data = {"source": "text", "path": str(source), "sequence_length": 64}
    with pytest.raises(ConfigError) as refused:
        supervised_shards(config_of("pretrain", **data), tokenizer, tmp_path / "rows")
    line = str(refused.value)
    for part in ("footer.parquet is damaged", "lines.jsonl line 3 is not JSON", "lines.jsonl line 4 is not JSON",
                 "and 1 more", "everything else can be read", "data.bad_files: skip"):  # fmt: skip
        assert part in line
    assert "\n" not in line and "good" not in line
    folder = supervised_shards(config_of("pretrain", **data, bad_files="skip"), tokenizer, tmp_path / "rows")
    (row,) = all_rows(folder)
    assert sorted(tokenizer.decode(row.ids).split("<|im_end|>")) == ["", "x + 1", "x + 2", "x + 4"]
    bad, empty = open_shards(folder).notes
    assert bad.startswith("4 damaged and left out: ") and empty == f"1 empty: {source / 'nothing.txt'} has no content"


WRONG_ROWS = {
    "no fields": ({"question": "x"}, "has neither `messages` nor the text fields"),
    "number": ({"prompt": 1, "completion": "x"}, "has neither `messages` nor the text fields"),
    "no object": ([1], "has neither `messages` nor the text fields"),
    "no answer": ({"messages": [{"role": "user", "content": "x"}]}, "do not end with a question and the assistant's"),
    "no content": ({"messages": [{"role": "user"}, {"role": "assistant", "content": "x"}]}, "`role` and `content`"),
}


@pytest.mark.parametrize("name", WRONG_ROWS)
def test_rows_of_another_form_are_named(tokenizer, tmp_path: Path, name: str):
    row, expected = WRONG_ROWS[name]
    path = jsonl(tmp_path / "a.jsonl", [PAIRS[0], row])
    config = config_of("sft", source="files", path=str(path), bad_files="skip")
    with pytest.raises(ConfigError) as refused:
        supervised_shards(config, tokenizer, tmp_path / "rows")
    assert f"{path} line 2" in str(refused.value) and expected in str(refused.value)


def test_a_chat_that_the_template_refuses_is_named(tmp_path: Path):
    own = tiny_tokenizer()
    own.chat_template = "{{ raise_exception('no ' + messages[0]['role']) }}"
    path = jsonl(tmp_path / "a.jsonl", PAIRS[:1])
    with pytest.raises(ConfigError, match=r"line 1 is refused by the chat template \(no user\)"):
        supervised_shards(config_of("sft", source="files", path=str(path)), own, tmp_path / "rows")
    own.chat_template = None
    with pytest.raises(ConfigError, match="has no chat template; add"):
        supervised_shards(config_of("sft", source="files", path=str(path)), own, tmp_path / "rows")


def test_empty_and_missing_sources_are_named(tokenizer, tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/x.bin").write_text("x")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "a.csv").write_text("x")
    cases = [
        ("pretrain", "text", "folder", "holds no .txt, .py"),
        ("pretrain", "text", "empty.jsonl", "is empty; give"),
        ("pretrain", "text", "blank.jsonl", "gives no rows"),
        ("pretrain", "text", "nowhere", "does not exist"),
        ("sft", "files", "a.csv", "must end with .jsonl or .parquet"),
        ("sft", "hub", "nowhere", "cannot be loaded"),
    ]
    for stage, source, name, expected in cases:
        path = str(tmp_path / name)
        with pytest.raises(ConfigError) as refused:
            supervised_shards(config_of(stage, source=source, path=path), tokenizer, tmp_path / "rows")
        line = str(refused.value)
        assert path in line and expected in line and "\n" not in line


def test_a_data_set_of_another_form_is_named(tokenizer, tmp_path: Path):
    (tmp_path / "hub").mkdir()
    jsonl(tmp_path / "hub/train.jsonl", [{"question": "x"}])
    config = config_of("sft", source="hub", path=str(tmp_path / "hub"))
    with pytest.raises(ConfigError, match=r"hub: row 1 has neither `messages`"):
        supervised_shards(config, tokenizer, tmp_path / "rows")


def test_shards_of_another_kind_or_tokenizer_are_refused(tokenizer, tmp_path: Path):
    text = config_of(
        "pretrain", source="text", path=str(jsonl(tmp_path / "a.jsonl", [{"text": "x"}])), sequence_length=16
    )
    folder = supervised_shards(text, tokenizer, tmp_path / "rows")
    shards = config_of("midtrain", source="shards", path=str(folder))
    assert supervised_shards(shards, tokenizer, tmp_path / "unused") == folder
    assert not (tmp_path / "unused").exists()
    with pytest.raises(ConfigError, match="holds rows of kind 'text', stage sft with this model needs 'instructions'"):
        supervised_shards(config_of("sft", source="shards", path=str(folder)), tokenizer, tmp_path / "unused")
    bigger = tiny_tokenizer()
    bigger.add_tokens(["another"])
    with pytest.raises(ConfigError, match=f"vocabulary size {len(tokenizer)}, .* needs {len(bigger)}"):
        supervised_shards(shards, bigger, tmp_path / "unused")


def test_rows_longer_than_the_context(tokenizer, tmp_path: Path):
    window = config_of("sft", source="microcode", max_prompt_tokens=40, completion_tokens=24)
    check_lengths(window, 64)
    with pytest.raises(
        ConfigError, match=r"data\.max_prompt_tokens \+ data\.completion_tokens: 64 positions, more than"
    ):
        check_lengths(window, 63)
    text = config_of(
        "pretrain", source="text", path=str(jsonl(tmp_path / "a.jsonl", [{"text": "x"}])), sequence_length=16
    )
    with pytest.raises(ConfigError, match=r"data\.sequence_length: 16 positions, .* context of 8; be at most 8"):
        check_lengths(text, 8)
    shards = config_of("pretrain", source="shards", path=str(supervised_shards(text, tokenizer, tmp_path / "rows")))
    check_lengths(shards, 16)
    with pytest.raises(ConfigError, match=r"data\.path: 16 positions, .* prepare rows of at most 8"):
        check_lengths(shards, 8)


@pytest.mark.parametrize("victim", ["00001.parquet", MANIFEST])
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, victim: str):
    rows = [Row(ids=[5, 6], lengths=[2], prompts=[0])] * 3
    folder = tmp_path / "rows"

    def write() -> None:
        facts = {"kind": "text", "length": 2, "pad_token_id": 0, "vocab_size": 9, "source": "test", "rows_per_file": 2}
        with ShardWriter(folder, **facts) as writer:
            (folder / f"{victim}.part").unlink(missing_ok=True)
            os.symlink("/dev/full", folder / f"{victim}.part")  # every write there: no space left on device
            writer.add(rows)

    with pytest.raises(RunStoppedError, match=f"{folder}: no space left on the disk for {victim}; nothing was kept"):
        write()
    assert list(folder.iterdir()) == []
    with pytest.raises(ConfigError, match="holds no manifest"):
        open_shards(folder)
