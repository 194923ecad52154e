"""The made-up runs of sample.py, as fixtures."""

import pytest
from sample import sample_run

from keepsight.results import LoadedRun


@pytest.fixture(scope="session")
def base() -> LoadedRun:
    return sample_run(0)


@pytest.fixture(scope="session")
def pre() -> LoadedRun:
    return sample_run(1)
