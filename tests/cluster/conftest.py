"""What needs a cluster: skipped where there is none, except where it is required (CI)."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.cluster.slurm import IsolatedSlurm, Slurm, missing, missing_namespaces


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A SLURM of two nodes."""
    why_not = missing()
    if why_not:
        if "slurm" in os.environ.get("DISTSURF_TESTS_REQUIRE", ""):
            pytest.fail(why_not)
        pytest.skip(why_not)
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.close()


@pytest.fixture
def isolated_slurm(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[IsolatedSlurm]:
    """Another one, whose nodes can crash and be cut off; skipped where the machine has no network namespaces."""
    if why_not := missing_namespaces():
        pytest.skip(why_not)
    cluster = IsolatedSlurm(tmp_path_factory.mktemp("isolated"))
    yield cluster
    cluster.close()
