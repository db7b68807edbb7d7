"""Benchmarks: which problems are asked, how, and what is made of the text that a model writes.

To add one: a function from its rows to a Task, and a line in BENCHMARKS.

task.py: a problem as it is asked. post_processing.py: what is taken of a text; frozen. originals.py: HumanEval and MBPP.
evalplus.py: HumanEval+ and MBPP+. bigcodebench.py, gsm8k.py, livecodebench.py. infilling.py: HumanEval-Infilling, whose
tasks are canvases with holes. programs.py: completions of training. results.py: scores, their intervals, the tables.
"""

from dataclasses import dataclass
from pathlib import Path

from diffrl.benchmarks.bigcodebench import complete_task, instruct_task
from diffrl.benchmarks.evalplus import humaneval_plus_task, mbpp_plus_task
from diffrl.benchmarks.gsm8k import gsm8k_task, with_examples
from diffrl.benchmarks.infilling import INFILLING, InfillingTask, infilling_tasks
from diffrl.benchmarks.livecodebench import livecodebench_task
from diffrl.benchmarks.originals import humaneval_task, mbpp_task
from diffrl.benchmarks.programs import canonical_code, completion_to_code
from diffrl.benchmarks.task import RowToTask, Style, Task
from diffrl.data.row_files import RowError, hub_rows, is_hub_name, read_rows
from diffrl.errors import one_of

__all__ = [
    "BENCHMARKS",
    "INFILLING",
    "InfillingTask",
    "Style",
    "Task",
    "TaskFile",
    "benchmark_tasks",
    "canonical_code",
    "completion_to_code",
    "infilling_tasks",
]

BENCHMARKS: dict[str, RowToTask] = {
    "humaneval": humaneval_task,
    "humaneval_plus": humaneval_plus_task,
    "mbpp": mbpp_task,
    "mbpp_plus": mbpp_plus_task,
    "bigcodebench_complete": complete_task,
    "bigcodebench_instruct": instruct_task,
    "livecodebench": livecodebench_task,
    "gsm8k": gsm8k_task,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFile:
    """TaskFile(tasks=(Task(...), ...), num_left_out=474)"""

    tasks: tuple[Task, ...]
    num_left_out: int  # rows that are not of the benchmark, such as MBPP's training split


def benchmark_tasks(benchmark: str, data: str | Path, *, limit: int | None = None) -> TaskFile:
    """The first `limit` tasks of a benchmark (None: all), in the order of its own file, or of the split `test` of a data set on
    the hub. Raises ValueError, one line, for an unknown benchmark, data that cannot be read, and a row that lacks a field."""
    one_of("benchmark", benchmark, dict.fromkeys((*BENCHMARKS, INFILLING)))
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: give 1 or more, or leave it out for the whole file")
    path, tasks = str(data), list[Task]()
    num_left_out = 0
    for place, row in hub_rows(path, "test") if is_hub_name(path) else read_rows(Path(path)):
        try:
            task = BENCHMARKS[benchmark](row)
        except RowError as error:
            raise ValueError(f"{path} {place} (benchmark {benchmark}): {error}") from None
        num_left_out += task is None
        if task is not None:
            tasks.append(task)
        if len(tasks) == limit:
            break
    if not tasks:
        raise ValueError(f"{path} has no problem of {benchmark}: give the benchmark's own file")
    if benchmark == "gsm8k":
        tasks = with_examples(tasks, path)
    names = [task.problem.id for task in tasks]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{path}: the problem {twice} stands there twice; remove one")
    return TaskFile(tasks=tuple(tasks), num_left_out=num_left_out)
