"""The made-up runs of sample.py, and pages in a browser, as fixtures."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from keepsight.results import LoadedRun
from tests.report.browser import Tab, chromium
from tests.report.sample import sample_run


@pytest.fixture(scope="session")
def base() -> LoadedRun:
    return sample_run(0)


@pytest.fixture(scope="session")
def pre() -> LoadedRun:
    return sample_run(1)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as found:
        yield found


@pytest.fixture
def opened(browser: Any) -> Iterator[Callable[..., Tab]]:
    tabs: list[Tab] = []

    def start(path: Path, **context: Any) -> Tab:
        tabs.append(Tab(browser, path, **context))
        return tabs[-1]

    yield start
    for tab in tabs:
        tab.close()
