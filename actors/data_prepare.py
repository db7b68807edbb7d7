"""`diffrl data prepare`: the rows of a supervised stage, made by Ray Data on all nodes of a cluster.

Every unit of data (diffrl/data/units.py) is read, tokenised and packed by one task, rows are sorted by their keys across
the cluster, and every file of shards is written by one task. Nothing depends on which task ran where or when: the rows
are those of `supervised_shards`, in the same order. Sources and the folder must be on a file system that all nodes see.
"""

import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from transformers import PreTrainedTokenizerFast

from actors.system import cluster
from diffrl.data.records import Faults
from diffrl.data.rows import (
    StageConfig,
    check_rows,
    check_template,
    facts_of,
    finished,
    inputs_of,
    make_rows,
    notes_of,
)
from diffrl.data.shard_writer import (
    WrittenFile,
    begin_folder,
    clear_folder,
    file_name,
    manifest_of,
    table_of,
    write_file,
    write_manifest,
)
from diffrl.data.shards import ROWS_PER_FILE, SCHEMA, Manifest, Row
from diffrl.data.units import UNIT_BYTES, Unit, unit_from_json, unit_to_json, units_of
from diffrl.errors import ConfigError, RunStoppedError
from diffrl.models.loading import load_policy_tokenizer

WRITTEN = pa.schema(
    [
        ("key", pa.int64()),
        ("num_rows", pa.int64()),
        ("num_tokens", pa.int64()),
        ("digest", pa.string()),
        ("problem", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareOptions:
    """How the work is cut up. Only `rows_per_file` and `unit_bytes` can be seen in the rows."""

    rows_per_file: int = ROWS_PER_FILE
    unit_bytes: int = UNIT_BYTES
    workers: int | None = None  # tasks at a time; None: as many as the cluster has CPUs for


def prepare_data(config: StageConfig, out: str | Path, options: PrepareOptions | None = None) -> Manifest:
    """Write the rows of `config` into `out`, or keep what is there if it was made from the same inputs. Prints a line.

    Raises ConfigError for a config, data or a folder that cannot be used, RunStoppedError for a full disk.
    """
    options = options or PrepareOptions()
    started = time.perf_counter()
    folder = Path(out).resolve()
    if config.data.source == "shards":
        raise ConfigError(f"data.source: {config.data.path} holds shards already; train from it as it is")
    try:
        tokenizer = load_policy_tokenizer(config.model)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    check_template(config, tokenizer)
    config = with_absolute_path(config)
    units = units_of(config.data, seed=config.seed, unit_bytes=options.unit_bytes)
    inputs = inputs_of(config, tokenizer, units)
    manifest = finished(folder, inputs)
    kept = manifest is not None
    if manifest is None:
        begin_folder(folder)
        try:
            with cluster(config.ray.address, num_cpus=1):
                manifest = write_shards(config, tokenizer, units, inputs, folder, options)
        except BaseException:
            clear_folder(folder)
            raise
    for note in manifest.notes:
        print(f"data: {note}")
    print(
        f"data: {manifest.num_rows} rows, {manifest.num_tokens} tokens, {len(manifest.files)} files in "
        f"{time.perf_counter() - started:.1f} s, fingerprint {manifest.fingerprint[:16]} -> {out}"
        + (" (kept: made from the same inputs)" if kept else "")
    )
    return manifest


def with_absolute_path(config: StageConfig) -> StageConfig:
    """Tasks may run in another working directory."""
    data = config.data
    if data.source not in ("text", "files"):
        return config
    assert data.path is not None
    return config.model_copy(update={"data": data.model_copy(update={"path": str(Path(data.path).resolve())})})


def write_shards(
    config: StageConfig,
    tokenizer: PreTrainedTokenizerFast,
    units: Sequence[Unit],
    inputs: str,
    folder: Path,
    options: PrepareOptions,
) -> Manifest:
    """Read, tokenise and pack; sort by keys; write. The folder is begun and empty."""
    with ordered_blocks(options.workers):
        items = [{"unit": unit_to_json(unit)} for unit in units]
        made = (
            ray.data.from_items(items, override_num_blocks=len(units))
            .map_batches(partial(unit_table, config=config, tokenizer=tokenizer), batch_size=1, batch_format="pyarrow")
            .materialize()
        )
        reports = made.map_batches(only_reports, batch_format="pyarrow").take_all()
        notes = notes_of((Faults.from_json(row["faults"]) for row in reports), config)
        check_rows(made.count() - len(reports), config)
        # Without materialize the files would be cut inside each of the sort's blocks, not across them.
        ordered = made.map_batches(without_reports, batch_format="pyarrow").sort("key").materialize()
        files = ordered.repartition(target_num_rows_per_block=options.rows_per_file, strict=True)
        written = files.map_batches(
            partial(write_block, folder=folder), batch_size=None, batch_format="pyarrow"
        ).take_all()
    return close_folder(folder, written, facts_of(config, tokenizer, inputs, notes), options.rows_per_file)


@contextmanager
def ordered_blocks(workers: int | None) -> Iterator[None]:
    """Ray Data keeps its blocks in order, as files are cut from sorted rows, runs `workers` tasks at a time, and tells no
    plans."""
    logger = logging.getLogger("ray.data")
    level = logger.level
    logger.setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current()
    options, progress_bars = context.execution_options, context.enable_progress_bars
    context.execution_options = copy(options)
    context.enable_progress_bars = progress_bars and sys.stderr.isatty()
    context.execution_options.preserve_order = True
    if workers is not None:
        context.execution_options.resource_limits = ray.data.ExecutionResources(cpu=workers)
    try:
        yield
    finally:
        context.execution_options, context.enable_progress_bars = options, progress_bars
        logger.setLevel(level)


def unit_table(block: pa.Table, *, config: StageConfig, tokenizer: PreTrainedTokenizerFast) -> pa.Table:
    """The rows of one unit with their keys, and as a last row without key what could not be used."""
    (unit,) = block["unit"].to_pylist()
    made = make_rows(unit_from_json(unit), config, tokenizer)
    rows = [*made.rows, Row(ids=[], lengths=[], prompts=[])]
    table = table_of(rows)
    table = table.append_column("key", pa.array([*made.keys, None], pa.int64()))
    return table.append_column("faults", pa.array([*[None] * len(made.rows), made.faults.to_json()], pa.string()))


def only_reports(table: pa.Table) -> pa.Table:
    return table.filter(table["faults"].is_valid()).select(["faults"])


def without_reports(table: pa.Table) -> pa.Table:
    return table.filter(table["key"].is_valid()).drop_columns(["faults"])


def write_block(block: pa.Table, *, folder: Path) -> pa.Table:
    """Write one file, for the time being under its first key; a full disk is reported, not raised: it is nobody's bug."""
    if len(block) == 0:
        return WRITTEN.empty_table()
    key = block["key"][0].as_py()
    rows = block.drop_columns(["key"]).cast(SCHEMA)
    try:
        report = asdict(write_file(folder / temporary_name(key), rows)) | {"problem": None}
    except RunStoppedError as error:
        report = {"num_rows": 0, "num_tokens": 0, "digest": "", "problem": str(error)}
    return pa.Table.from_pylist([report | {"key": key}], schema=WRITTEN)


def temporary_name(key: int) -> str:
    return f"key-{key:019d}.parquet"


def close_folder(
    folder: Path, written: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], rows_per_file: int
) -> Manifest:
    """Give the files their names, in the order of their keys, and write the manifest."""
    reports = sorted(written, key=lambda report: report["key"])
    for report in reports:
        if report["problem"] is not None:
            raise RunStoppedError(report["problem"])
    assert all(report["num_rows"] == rows_per_file for report in reports[:-1]), "files were not cut as they should be"
    files = {}
    for number, report in enumerate(reports):
        files[file_name(number)] = WrittenFile(**{f.name: report[f.name] for f in fields(WrittenFile)})
        (folder / temporary_name(report["key"])).rename(folder / file_name(number))
    manifest = manifest_of(files, facts)
    write_manifest(folder, manifest)
    return manifest
