"""The folder of rows that a supervised stage trains from: what its `data` section names, tokenised and laid out.

`make_rows` is a pure function of a unit of data, the config and the tokenizer; rows are then sorted by keys drawn from
(seed, unit, place in the unit). So the folder is shuffled and the same however many processes made it.

Text that looks like a special token is tokenised as text, except in the turns of a chat, where the template writes such
tokens itself.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from diffrl.config import PretrainConfig, SftConfig
from diffrl.data.pack import Piece, pack, padded_row, text_rows, window_row
from diffrl.data.records import Chat, Document, Faults, settle
from diffrl.data.shard_writer import ShardWriter
from diffrl.data.shards import MANIFEST, ROWS_PER_FILE, Manifest, Row, open_shards
from diffrl.data.units import Unit, read_unit, sources_of, units_of
from diffrl.errors import ConfigError
from diffrl.models.tokens import special_id
from diffrl.seeds import derive_seed

ROWS_VERSION = 1  # of what is made from the same inputs
NOT_IN_ROWS = {"path", "pad_weight", "condition_steps"}  # keys of `data` that rows do not depend on
StageConfig = PretrainConfig | SftConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeRows:
    rows: Sequence[Row]
    keys: Sequence[int]  # rows are written in their order
    faults: Faults


def say_on_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def supervised_shards(
    config: StageConfig,
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    say: Callable[[str], None] = say_on_stderr,
    rows_per_file: int = ROWS_PER_FILE,
) -> Path:
    """The folder of shards to train from: `data.path` of source `shards`, else `folder`, which is written, or kept when it
    was made from the same inputs. Rows that were left out are said. Raises ConfigError, RunStoppedError (full disk)."""
    if config.data.source == "shards":
        assert config.data.path is not None
        check_shards(open_shards(config.data.path), config, tokenizer)
        return Path(config.data.path)
    check_template(config, tokenizer)
    units = units_of(config.data, seed=config.seed)
    inputs = inputs_of(config, tokenizer, units)
    if finished(folder, inputs) is None:
        made = [make_rows(unit, config, tokenizer) for unit in units]
        notes = notes_of((m.faults for m in made), config)
        keyed = [pair for m in made for pair in zip(m.keys, m.rows, strict=True)]
        ordered = [row for _, row in sorted(keyed, key=lambda pair: pair[0])]
        check_rows(len(ordered), config)
        with ShardWriter(folder, **facts_of(config, tokenizer, inputs, notes), rows_per_file=rows_per_file) as writer:
            writer.add(ordered)
        for note in notes:
            say(f"{config.stage}: {note}")
    return folder


def make_rows(unit: Unit, config: StageConfig, tokenizer: PreTrainedTokenizerFast) -> MadeRows:
    """The rows of one unit with their sort keys, and what could not be used."""
    records, faults = read_unit(unit, chats=isinstance(config, SftConfig))
    if isinstance(config, PretrainConfig):
        texts = [record.text for record in records if isinstance(record, Document)]
        end = special_id(tokenizer, "eos")
        rows = text_rows(encode(tokenizer, texts), config.data.sequence_length, end_token_id=end)
    else:
        chats = [record for record in records if isinstance(record, Chat)]
        rows = instruction_rows(chats, config, tokenizer, faults)
    keys = [derive_seed(config.seed, "order", unit.number, n) for n in range(len(rows))]
    return MadeRows(rows=rows, keys=keys, faults=faults)


def instruction_rows(
    chats: Sequence[Chat], config: SftConfig, tokenizer: PreTrainedTokenizerFast, faults: Faults
) -> list[Row]:
    """Chats in the config's layout; those that do not fit go to `faults`."""
    data, pad = config.data, special_id(tokenizer, "pad")
    pairs = []
    for chat, prompt, completion in tokenize_chats(chats, tokenizer, faults):
        sizes = f"has {len(prompt)} prompt tokens and {len(completion)} completion tokens with the end token, more than"
        if data.layout == "window":
            if len(prompt) > data.max_prompt_tokens or len(completion) > data.completion_tokens:
                room = f"max_prompt_tokens {data.max_prompt_tokens} and completion_tokens {data.completion_tokens}"
                faults.add("long", chat.place, f"{sizes} {room}")
                continue
        elif len(prompt) + len(completion) > data.sequence_length:
            faults.add("long", chat.place, f"{sizes} sequence_length {data.sequence_length}")
            continue
        pairs.append((prompt, completion))
    length = row_length(config)
    if data.layout == "packed":
        return pack((Piece([*prompt, *completion], len(prompt)) for prompt, completion in pairs), length)
    if data.layout == "padded":
        return [padded_row(prompt, completion, length=length, pad=pad) for prompt, completion in pairs]
    window = {"prompt_length": data.max_prompt_tokens, "length": length, "pad": pad}
    return [window_row(prompt, completion, **window) for prompt, completion in pairs]


def tokenize_chats(
    chats: Sequence[Chat], tokenizer: PreTrainedTokenizerFast, faults: Faults
) -> Iterator[tuple[Chat, list[int], list[int]]]:
    """(chat, prompt ids, completion ids with the end token), the prompt as `prompts.chat_ids` would ask it."""
    kept, prompts = [], []
    for chat in chats:
        try:
            turns = [dict(message) for message in chat.messages]
            prompts.append(str(tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)))
            kept.append(chat)
        except TemplateError as error:
            faults.add("form", chat.place, f"is refused by the chat template ({error})")
    prompt_ids = encode(tokenizer, prompts, special=True)
    completion_ids = encode(tokenizer, [chat.completion for chat in kept])
    end = special_id(tokenizer, "eos")
    for chat, prompt, completion in zip(kept, prompt_ids, completion_ids, strict=True):
        yield chat, prompt, [*completion, end]


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
    """`special`: whether special tokens are recognised in the texts."""
    if not texts:
        return []
    ids = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=not special, verbose=False)["input_ids"]
    assert isinstance(ids, list)
    return ids


def row_length(config: StageConfig) -> int:
    """Positions of the longest row there can be. Raises ConfigError for shards that cannot be read."""
    data = config.data
    if data.source == "shards":
        assert data.path is not None
        return open_shards(data.path).length
    return data.row_length


def check_lengths(config: StageConfig, max_positions: int) -> None:
    """Raises ConfigError for rows that are longer than the model's context (`max_position_embeddings`)."""
    length = row_length(config)
    if length <= max_positions:
        return
    window = isinstance(config, SftConfig) and config.data.layout == "window"
    name = "data.max_prompt_tokens + data.completion_tokens" if window else "data.sequence_length"
    name, way_out = (
        ("data.path", f"prepare rows of at most {max_positions} tokens")
        if config.data.source == "shards"
        else (name, f"be at most {max_positions}")
    )
    raise ConfigError(f"{name}: {length} positions, more than the model's context of {max_positions}; {way_out}")


def check_shards(manifest: Manifest, config: StageConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raises ConfigError for rows that were made for another kind of stage or another tokenizer."""
    for what, found, needed in (
        ("kind", manifest.kind, kind_of(config)),
        ("vocabulary size", manifest.vocab_size, len(tokenizer)),
        ("pad token", manifest.pad_token_id, special_id(tokenizer, "pad")),
    ):
        if found != needed:
            raise ConfigError(
                f"data.path: {config.data.path} holds rows of {what} {found!r}, stage {config.stage} with this model "
                f"needs {needed!r}; prepare them again with this config's model"
            )


def kind_of(config: StageConfig) -> str:
    return "instructions" if isinstance(config, SftConfig) else "text"


def check_template(config: StageConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    if isinstance(config, SftConfig) and tokenizer.chat_template is None:
        raise ConfigError(
            f"model.path: the tokenizer of {config.model.path} has no chat template; add chat_template.jinja"
        )


def check_rows(num_rows: int, config: StageConfig) -> None:
    if num_rows == 0:
        raise ConfigError(
            f"data.path: {config.data.path} gives no rows; give data with text, or check what was left out"
        )


def notes_of(faults: Iterable[Faults], config: StageConfig) -> list[str]:
    """What was left out, in words. Raises ConfigError for what may not be."""
    together = Faults()
    for some in faults:
        together.merge(some)
    return settle(together, config.data)


def inputs_of(config: StageConfig, tokenizer: PreTrainedTokenizerFast, units: Sequence[Unit]) -> str:
    """sha256 of all that rows are made from, where the files lie left out."""
    root = str(config.data.path)
    model = json.loads(tokenizer.backend_tokenizer.to_str())
    facts = {
        "version": ROWS_VERSION,
        "data": config.data.model_dump(exclude=NOT_IN_ROWS),
        "seed": config.seed,
        "tokenizer": {key: value for key, value in model.items() if key not in ("padding", "truncation")},
        "template": tokenizer.chat_template,
        "tokens": [special_id(tokenizer, name) for name in ("eos", "pad")],
        "sources": {path.removeprefix(root): digest for path, digest in sources_of(units).items()},
        "units": [len(unit.slices) or len(unit.records) for unit in units],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def facts_of(
    config: StageConfig, tokenizer: PreTrainedTokenizerFast, inputs: str, notes: Sequence[str]
) -> dict[str, Any]:
    """What a manifest says beside its files."""
    data = config.data
    return {
        "kind": kind_of(config),
        "length": row_length(config),
        "pad_token_id": special_id(tokenizer, "pad"),
        "vocab_size": len(tokenizer),
        "source": data.source if data.path is None else f"{data.source} {data.path}",
        "inputs": inputs,
        "notes": list(notes),
    }


def finished(folder: Path, inputs: str) -> Manifest | None:
    """The manifest of a folder that was made from the same inputs, None for one without. Raises ConfigError for others."""
    if not (folder / MANIFEST).is_file():
        return None
    manifest = open_shards(folder)
    if manifest.inputs != inputs:
        raise ConfigError(
            f"{folder} holds rows of other inputs (source {manifest.source}, {manifest.num_rows} rows); name another folder, "
            "or remove it"
        )
    return manifest
