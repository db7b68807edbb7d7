"""The rollouts that a run stored, as samples."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from diffrl.analysis.results import RunResult
from diffrl.analysis.samples import Sample, measure, order_map
from diffrl.config.analyze import AnalyzeConfig
from diffrl.rollout_store import read_step, step_files


def read_run(name: str, path: Path, config: AnalyzeConfig) -> RunResult:
    """Of at most `groups_per_step` groups of every step. pass@k is that of one sample: siblings are too few for more. Raises
    ValueError for a run without rollouts, or without step maps."""
    by_step = {step: read_samples(file, config.groups_per_step) for step, file in step_files(path / "rollouts")}
    samples = [sample for own in by_step.values() for sample in own]
    if not samples:
        raise ValueError(
            f"SOURCE: {path} holds no rollouts yet; give a run that has finished a step, or a model's folder"
        )
    if len({len(sample.step_map_C) for sample in samples}) > 1:
        raise ValueError(f"SOURCE: {path} has rollouts of several windows; give runs of one sampling.completion_tokens")
    return RunResult(
        name=name,
        overall=measure(samples, max_k=config.max_k, pass_ks=(1,)),
        order=order_map(samples),
        steps=tuple((step, measure(own, max_k=config.max_k, pass_ks=(1,))) for step, own in by_step.items()),
    )


def read_samples(file: Path, num_groups: int) -> list[Sample]:
    table = read_step(file)
    if missing := [name for name in ("step_map", "probability", "ordinal") if name not in table.column_names]:
        raise ValueError(f"SOURCE: {file} has no column {missing[0]}; give a run that this diffrl wrote")
    ordinals = table.column("ordinal").to_numpy()
    known = np.unique(ordinals)
    if not known.size:
        return []
    chosen = known[np.linspace(0, len(known) - 1, min(num_groups, len(known))).astype(int)]
    rows = table.filter(pa.array(np.isin(ordinals, chosen))).to_pylist()
    return [sample_of(file, row) for row in rows]


def sample_of(file: Path, row: dict) -> Sample:
    """A group is one of its own: the same problem at another time is another one."""
    size = len(row["completion_ids"])
    step_map_C = np.asarray(row["step_map"], dtype=np.int32)
    if len(step_map_C) != size or size == 0 or step_map_C.min() < 0:
        raise ValueError(
            f"SOURCE: {file}: the rollout of {row['problem_id']}, sample {row['sample_index']}, has no step map for its {size} "
            "tokens, so there is no decoding order; give a run of a diffusion model"
        )
    passed = None
    if row["valid"]:
        passed = row["format"] == 1.0 and all(status == "passed" for status in row["statuses"])
    return Sample(
        problem_id=f"{row['problem_id']} #{row['ordinal']}",
        ids_C=np.asarray(row["completion_ids"], dtype=np.int32),
        step_map_C=step_map_C,
        probability_C=np.asarray(row["probability"], dtype=np.float16),
        num_tokens=row["num_tokens"],
        passed=passed,
    )
