"""Problems that broke the workers they were given to, and are not given out again: `quarantine.jsonl` of a run folder.

A problem is out from the ordinal on at which it was found out. So a run that is resumed from before that ordinal, with
the file as it is, draws the same prompts as it did.
"""

import json
from pathlib import Path

from diffrl.errors import RunStoppedError

QUARANTINE = "quarantine.jsonl"


class Quarantine:
    """At most `limit` of the run's `num_problems` problems."""

    def __init__(self, folder: Path, *, limit: int, num_problems: int):
        self.file = folder / QUARANTINE
        self.limit = limit
        self.num_problems = num_problems
        lines = self.file.read_text().splitlines(keepends=True) if self.file.exists() else []
        whole = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may have been cut off by a crash
        self.since: dict[str, int] = {row["problem_id"]: row["ordinal"] for row in whole}
        if lines and not lines[-1].endswith("\n"):
            self.file.write_text("".join(lines[:-1]))

    def holds(self, problem_id: str, ordinal: int) -> bool:
        """Whether the prompt at this place of the stream is left out."""
        since = self.since.get(problem_id)
        return since is not None and since <= ordinal

    def count(self, ordinal: int) -> int:
        """Problems that are out at this place of the stream."""
        return sum(since <= ordinal for since in self.since.values())

    def add(self, problem_id: str, ordinal: int, reason: str) -> None:
        """Raises RunStoppedError when that is one too many."""
        if self.holds(problem_id, ordinal):
            return  # it was under way twice
        self.since[problem_id] = ordinal
        with self.file.open("a") as file:
            file.write(json.dumps({"problem_id": problem_id, "ordinal": ordinal, "reason": reason}) + "\n")
        if len(self.since) > self.limit or len(self.since) >= self.num_problems:
            limit = f"more than {self.limit}" if len(self.since) > self.limit else "all there are"
            raise RunStoppedError(
                f"supervision.max_quarantined: {len(self.since)} problems broke the workers that they were given to, "
                f"{limit}; the last was {problem_id}: {reason}; they are listed in {self.file}; leave them out of the "
                "data, mend the workers, or raise the limit"
            )
