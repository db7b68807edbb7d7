"""EvalPlus's own verdicts, in a Python that has evalplus 0.3.1; started by evalplus_agreement.py, never imported.

stdin: JSON {"data": {"humaneval": FILE, "mbpp": FILE}, "programs": [{"dataset", "task_id", "code"}, ...]}. stdout: a JSON line
for each program: {"base": "pass" | "fail" | "timeout", "plus": ...}. What is expected comes from the reference solution, as
in evalplus.evaluate. The limit for each input is wide, for other work may run beside this.
"""

import json
import sys
import types

sys.modules["datasets"] = types.SimpleNamespace(load_dataset=None)  # evalplus.data imports it for what is not used here

from evalplus.data.mbpp import mbpp_deserialize_inputs  # noqa: E402
from evalplus.data.utils import stream_jsonl  # noqa: E402
from evalplus.eval import MBPP_OUTPUT_NOT_NONE_TASKS, untrusted_check  # noqa: E402
from evalplus.gen.util import trusted_exec  # noqa: E402

SECONDS = 20.0


def main() -> None:
    job = json.load(sys.stdin)
    rows = {name: {row["task_id"]: row for row in stream_jsonl(file)} for name, file in job["data"].items()}
    known = {}
    for program in job["programs"]:
        dataset, name = program["dataset"], program["task_id"]
        row, verdicts = rows[dataset][name], {}
        for part in ("base", "plus"):
            if (name, part) not in known:
                inputs = row[f"{part}_input"]
                inputs = mbpp_deserialize_inputs(name, inputs) if dataset == "mbpp" else inputs
                expected, seconds = trusted_exec(
                    row["prompt"] + row["canonical_solution"],
                    inputs,
                    row["entry_point"],
                    record_time=True,
                    output_not_none=row["entry_point"] in MBPP_OUTPUT_NOT_NONE_TASKS,
                )
                known[name, part] = inputs, expected, seconds
            inputs, expected, seconds = known[name, part]
            verdicts[part], _ = untrusted_check(
                dataset,
                program["code"],
                inputs,
                row["entry_point"],
                expected=expected,
                atol=row["atol"],
                ref_time=seconds,
                fast_check=True,
                min_time_limit=SECONDS,
            )
        print(json.dumps(verdicts), flush=True)


if __name__ == "__main__":
    main()
