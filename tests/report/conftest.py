"""The made-up runs of sample.py, as fixtures."""

import pytest

from keepsight.results import LoadedRun
from tests.report.sample import sample_run


@pytest.fixture(scope="session")
def base() -> LoadedRun:
    return sample_run(0)


@pytest.fixture(scope="session")
def pre() -> LoadedRun:
    return sample_run(1)
