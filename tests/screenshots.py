"""Two pictures of the rollout board for README, of synthetic runs or others: `python -m tests.screenshots [RUN [RUN2]]`."""

import contextlib
import sys
import tempfile
import threading
import time
from pathlib import Path

from diffrl.board.server import BoardOptions, open_board
from tests.browser import Browser, chromium
from tests.diffrl.board_run import Shape, make_run

DOCS = Path(__file__).parents[1] / "docs"
MAX_BYTES = 300_000
SHAPE = Shape(steps=40, groups=8, group_size=8, problems=20)


def pictures(folders: list[str]) -> None:
    with open_board(folders, BoardOptions(port=0)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        while any(
            run["unscanned"] or run["read"] < max(1, run["files"]) for run in server.board.answer("state", {})["runs"]
        ):
            time.sleep(0.2)
        listed = server.board.answer("rollouts", {"verdict": "some passed", "sort": "length"})["rows"]
        listed = listed or server.board.answer("rollouts", {"sort": "length"})["rows"]
        step, ordinal, sample = listed[len(listed) // 3]["key"].split("/")
        with chromium() as browser:
            browser.size(1200, 780)
            browser.scheme("light")
            picture(
                browser,
                f"{server.url}#/overview",
                "document.querySelectorAll('.chart').length > 2",
                "board-overview.png",
            )
            browser.scheme("dark")
            place = f"rollout?step={step}&ordinal={ordinal}&sample={sample}"
            browser.open("about:blank")
            browser.open(f"{server.url}#/{place}")
            last = int(browser.wait("document.querySelector('.slider')?.max"))
            place = f"{place}&at={last * 3 // 5}"
            picture(
                browser,
                f"{server.url}#/{place}",
                "document.querySelectorAll('.tok.masked').length > 0",
                "board-rollout.png",
            )


def picture(browser: Browser, url: str, until: str, name: str) -> None:
    browser.open("about:blank")
    browser.open(url)
    browser.wait(until)
    time.sleep(0.5)  # colours fade in
    browser.screenshot(DOCS / name)
    size = (DOCS / name).stat().st_size
    print(f"docs/{name}: {size:,} bytes")
    assert size < MAX_BYTES, f"{name} is too large for the repository"


def main() -> None:
    DOCS.mkdir(exist_ok=True)
    if sys.argv[1:]:
        pictures(sys.argv[1:])
        return
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        first = make_run(Path("runs/synthetic"), SHAPE)
        second = make_run(
            Path("runs/other"),
            Shape(steps=40, groups=8, group_size=8, problems=20, seed=1, gain=0.3),
        )
        pictures([str(first), str(second)])


if __name__ == "__main__":
    main()
