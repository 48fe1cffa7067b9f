"""Which device and how many threads each rank uses, and one line that says so."""

from __future__ import annotations

import ctypes
import os
import socket
from collections import Counter
from dataclasses import dataclass

import torch

from distsurf.distribute.ranks import Ranks
from distsurf.errors import InputError


def _keep_freed_memory() -> None:
    """Have the C library keep freed memory for the next batch rather than give it back to the kernel.

    Activations come and go with every layer; where glibc maps and unmaps them each time, page faults were measured to
    take about 40 % of a small network's time (`make bench`, "memory"). Changes no
    value. Other C libraries are left as they are.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(mmap_threshold, 256 << 20)
    mallopt(trim_threshold, 512 << 20)


def usable_cores() -> list[int]:
    """The cores that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return sorted(affinity(0)) if affinity else list(range(os.cpu_count() or 1))


def _granted_cores() -> int:
    """The cores that SLURM gives to each task, also where it does not bind tasks to them; very many outside SLURM."""
    told = os.environ.get("SLURM_CPUS_PER_TASK", "")
    return int(told) if told.isdigit() and int(told) else 1 << 30


@dataclass(frozen=True)
class Placement:
    """Where this rank computes, and all ranks' placement in words."""

    device: torch.device
    threads: int
    summary: str

    def apply(self) -> None:
        """Set the calling thread's device and number of threads (both are settings of a thread)."""
        torch.set_num_threads(self.threads)
        if self.device.type == "cpu":
            _keep_freed_memory()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)


def place(ranks: Ranks, device: str = "auto", threads: int = 0) -> Placement:
    """Choose this rank's device and threads; every rank takes part.

    ``auto`` takes the GPU of the rank's number on its node, modulo the GPUs that it can see, or the CPU. On the CPU
    the cores that the ranks of a node may use are divided among them (``threads = 0``), at least one each.
    Raises InputError for a device that is not there.
    """
    cores = usable_cores()
    host = socket.gethostname()
    with ranks.together():
        chosen = _device(device, ranks.node_rank)
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else chosen.type.upper()
    # Ranks that were bound to cores of their own keep them; ranks with the same cores share them.
    mine = f"{host}|{','.join(map(str, cores))[:600]}"
    sharing = ranks.gather(mine).count(mine)
    threads = threads or max(1, min(len(cores) // sharing, _granted_cores()))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "") if chosen.type == "cuda" else ""
    everybody = ranks.gather(f"{host}|{chosen}|{visible}|{name}|{threads}")
    return Placement(chosen, threads, _in_words([answer.split("|") for answer in everybody]))


def _device(device: str, node_rank: int) -> torch.device:
    if device == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", node_rank % torch.cuda.device_count())
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise InputError(
            f"device {device!r} cannot be used ({str(error).splitlines()[0]}); expected auto, cpu, cuda or cuda:N"
        ) from error
    if device == "cuda":
        chosen = torch.device("cuda", node_rank % torch.cuda.device_count())
    return chosen


def _in_words(everybody: list[list[str]]) -> str:
    size = len(everybody)
    nodes = len({host for host, *_ in everybody})
    who = "1 process" if size == 1 else f"{size} ranks"
    where = f"on {everybody[0][0]}" if nodes == 1 else f"on {nodes} nodes"
    names = ", ".join(sorted({name for _, _, _, name, _ in everybody}))
    threads = sorted({int(threads) for *_, threads in everybody})
    each = f"{threads[0]}" if len(threads) == 1 else f"{threads[0]} to {threads[-1]}"
    on_gpu = [
        (host, device, visible) for host, device, visible, _, _ in everybody if device.startswith("cuda")
    ]
    if not on_gpu:
        return f"{who} {where}: {names}, {each} thread{'s' * (each != '1')} each"
    most = max(Counter(on_gpu).values())
    share = "a GPU of its own" if most == 1 else f"up to {most} ranks per GPU"
    return f"{who} {where}: {names}, {share}"
