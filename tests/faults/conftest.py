"""Where the fault tests' processes begin."""

import pytest
from forked import Nursery


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    """It forks lives of the program; those that are left end with it."""
    nursery = Nursery(tmp_path_factory.mktemp("nursery") / "log")
    yield nursery
    nursery.close()
