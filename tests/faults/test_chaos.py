"""The short version of `make chaos`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.chaos import Chaos


@pytest.mark.parametrize("seed", [11, 12])
def test_random_blows(tmp_path: Path, seed: int) -> None:
    chaos = Chaos(tmp_path, seed)
    for number in range(4):
        chaos.round(number)
    assert sum(tally.blows for tally in chaos.tallies.values()) > 2
    assert not any(tally.lost for tally in chaos.tallies.values())
