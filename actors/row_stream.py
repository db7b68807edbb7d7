"""Training rows through Ray Data: files of shards are read ahead, by tasks anywhere in the cluster, in the stream's order.

Every worker reads the whole stream and takes its share of every batch, so batches do not depend on the number of workers;
and the stream begins at any row, so a stage goes on where its checkpoint says.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray.data

from diffrl.data.shards import Manifest, Part, kept_sizes, read_table, training_parts

READERS = 2  # files that are read at the same time, for each worker
MAX_BLOCKS = 200


def stream_rows(
    shards: Path, manifest: Manifest, *, seed: int, first: int, stop: int, held_out: int, batch_size: int
) -> Iterator[pa.Table]:
    """Rows `first` to `stop` of the stream (see `training_parts`) in tables of `batch_size`, as they lie in the files."""
    kept = kept_sizes(manifest, held_out)
    parts = training_parts(manifest, seed=seed, first=first, stop=stop, held_out=held_out)
    items = [{"file": p.file, "seed": p.seed, "first": p.first, "stop": p.stop, "kept": kept[p.file]} for p in parts]
    if not items:
        return
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False

    def read(batch: Any) -> Any:
        (item,) = batch.to_pylist()
        num_kept = item.pop("kept")
        return read_table(shards, Part(**item), num_kept=num_kept)

    rows = ray.data.from_items(items, override_num_blocks=min(len(items), MAX_BLOCKS))
    # No CPU is asked for: there may be none left beside the workers, which would then wait for ever.
    rows = rows.map_batches(
        read, batch_size=1, batch_format="pyarrow", num_cpus=0, compute=ray.data.TaskPoolStrategy(size=READERS)
    )
    yield from rows.iter_batches(batch_size=batch_size, batch_format="pyarrow", prefetch_batches=2)
