"""Deque's axe-core over the page that is open: what it would tell a reader with a screen reader, a keyboard or weak eyes.

Its one script comes with a package from PyPI, which `make axe` puts beside the virtual environment's own packages.
"""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.browser import Browser

AXE = Path(sys.prefix) / "axe" / "axe_playwright_python" / "axe.min.js"
# What WCAG 2.2 asks on levels A and AA, and what axe calls good practice.
RUN = """axe.run(document, {resultTypes: ['violations'], preload: false}).then((found) => ({
  passed: found.passes.length,
  violations: found.violations.flatMap((rule) => rule.nodes.map((node) => `${rule.id}: ${node.html.slice(0, 200)}`)),
}))"""


def script() -> str:
    if not AXE.is_file():
        assert not os.environ.get("CI"), f"{AXE} is missing: make axe"
        pytest.skip(f"{AXE} is missing: make axe")
    return AXE.read_text()


def violations(browser: Browser) -> list[str]:
    """Rule and element of each. That it looked at all is asserted."""
    if not browser.eval("Boolean(window.axe)"):
        browser.eval(f"{script()}; null")
    found = browser.eval(RUN)
    assert found["passed"] > 10, json.dumps(found)
    return found["violations"]
