"""Problems that broke the workers they were given to, and are not given out again: `quarantine.jsonl` of a run folder.

A problem is out of the prompts that are drawn after it was found out. A run that is resumed from before that draws it
again, and gives it up again without a try: so it draws the same prompts as it did.
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
        self.since: dict[str, int] = {}  # problem -> the first ordinal without it
        self.given_up: dict[int, str] = {}  # ordinal -> why
        for row in whole:
            self.since.setdefault(row["problem_id"], row["since"])
            self.given_up[row["ordinal"]] = row["reason"]
        if lines and not lines[-1].endswith("\n"):
            self.file.write_text("".join(lines[:-1]))

    def holds(self, problem_id: str, ordinal: int) -> bool:
        """Whether the prompt at this place of the stream is left out."""
        since = self.since.get(problem_id)
        return since is not None and since <= ordinal

    def count(self, ordinal: int) -> int:
        """Problems that are out at this place of the stream."""
        return sum(since <= ordinal for since in self.since.values())

    def add(self, problem_id: str, ordinal: int, reason: str, *, since: int) -> None:
        """The group at `ordinal` was given up; its problem is out from `since` on. Raises RunStoppedError when that is one
        too many."""
        if ordinal in self.given_up:
            return  # before the run was resumed
        self.given_up[ordinal] = reason
        new = problem_id not in self.since
        self.since.setdefault(problem_id, since)  # it may have been under way twice
        row = {"problem_id": problem_id, "ordinal": ordinal, "since": self.since[problem_id], "reason": reason}
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        if new and (len(self.since) > self.limit or len(self.since) >= self.num_problems):
            limit = f"more than {self.limit}" if len(self.since) > self.limit else "all there are"
            raise RunStoppedError(
                f"supervision.max_quarantined: {len(self.since)} problems broke the workers that they were given to, "
                f"{limit}; the last was {problem_id}: {reason}; they are listed in {self.file}; leave them out of the "
                "data, mend the workers, or raise the limit"
            )
