"""Devices and threads, on machines that are not here: what CUDA says is replaced, nothing else."""

from __future__ import annotations

import socket

import pytest
import torch

from distsurf.distribute import placement
from distsurf.distribute.placement import place
from distsurf.distribute.ranks import Ranks
from distsurf.errors import InputError


class Pretended(Ranks):
    """One of several ranks on a node; the others answer alike, each for its own place."""

    def __init__(self, node_rank: int, size: int, gpus: int):
        self.node_rank, self.node_size, self.size, self.gpus = node_rank, size, size, gpus

    def gather(self, text: str) -> list[str]:
        own = f"cuda:{self.node_rank % self.gpus}" if self.gpus else ""
        return [text.replace(own, f"cuda:{rank % self.gpus}") if own else text for rank in range(self.size)]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    count: int = request.param
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    return count


@pytest.mark.parametrize(
    ("gpus", "size", "devices", "words"),
    [
        (4, 4, ["cuda:0", "cuda:1", "cuda:2", "cuda:3"], "4 ranks on HOST: NVIDIA H200, a GPU of its own"),
        (2, 6, ["cuda:0", "cuda:1"] * 3, "6 ranks on HOST: NVIDIA H200, up to 3 ranks per GPU"),
        (1, 1, ["cuda:0"], "1 process on HOST: NVIDIA H200, a GPU of its own"),
        (0, 2, ["cpu", "cpu"], "2 ranks on HOST: CPU, 4 threads each"),
        (0, 12, ["cpu"] * 12, "12 ranks on HOST: CPU, 1 thread each"),
    ],
    indirect=["gpus"],
)
def test_devices_by_local_rank(
    gpus: int, size: int, devices: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "usable_cores", lambda: list(range(8)))
    placed = [place(Pretended(rank, size, gpus)) for rank in range(size)]
    assert [str(p.device) for p in placed] == devices
    assert placed[0].summary == words.replace("HOST", socket.gethostname())


def test_threads_and_devices_by_choice() -> None:
    placed = place(Ranks(), device="cpu", threads=3)
    assert (placed.device.type, placed.threads) == ("cpu", 3)
    for device in ("cuda:7", "gpu", "tpu:0"):
        with pytest.raises(InputError, match="expected auto, cpu, cuda or cuda:N"):
            place(Ranks(), device=device)


@pytest.mark.parametrize("gpus", [0], indirect=True)
def test_threads_are_no_more_than_slurm_gives(gpus: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it does not bind tasks to their cores."""
    monkeypatch.setattr(placement, "usable_cores", lambda: list(range(16)))
    assert place(Ranks()).threads == 16
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    assert place(Ranks()).threads == 3
    assert place(Ranks(), threads=5).threads == 5
