"""A browser for all tests of a worker."""

import os
from collections.abc import Iterator

import pytest

from tests.browser.chromium import NAMES, Chromium, chromium, find_chromium


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    """Chromium; a skip where it is missing, or a failure where MOEZOO_REQUIRE_BROWSER is set."""
    program = find_chromium()
    if program is None:
        reason = f"no {' or '.join(NAMES)} on the PATH; install one (Debian: apt-get install chromium)"
        if os.environ.get("MOEZOO_REQUIRE_BROWSER"):
            pytest.fail(f"{reason}; MOEZOO_REQUIRE_BROWSER is set")
        pytest.skip(reason)
    with chromium(program, tmp_path_factory.mktemp("profile")) as running:
        yield running
