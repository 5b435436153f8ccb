"""The rules of axe-core on the page that a browser shows."""

import importlib.util
from pathlib import Path
from typing import Any

from tests.browser.chromium import Chromium


def assert_accessible(browser: Chromium) -> None:
    """Assert that axe-core finds nothing serious or critical."""
    found = importlib.util.find_spec("axe_core_python")
    assert found is not None, "axe-core-python is missing; make setup installs it"
    script = Path(str(found.origin)).parent / "axe.min.js"
    browser.run(script.read_text(encoding="utf-8") + "; 0")
    violations: list[dict[str, Any]] = browser.run(
        "axe.run().then(found => found.violations.filter(rule => ['serious', 'critical'].includes(rule.impact))"
        ".map(rule => ({rule: rule.id, nodes: rule.nodes.slice(0, 3).map(node => node.html.slice(0, 200))})))"
    )
    assert violations == []
