"""What this machine can do: matrix multiplications and memory traffic per second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from distsurf.objective.precision import Precision, arithmetic


def matrix_rate(device: torch.device, precision: Precision, repeats: int = 7) -> float:
    """FLOP/s of square matrix products in a precision (2n³ each), the median of several."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(precision.compute) for _ in range(2))
    with torch.inference_mode(), arithmetic(precision):
        return 2 * size**3 / _median_seconds(lambda: torch.mm(a, b), device, repeats)


def memory_bandwidth(device: torch.device, repeats: int = 7) -> float:
    """Bytes/s, read and written, of copying a buffer much larger than any cache."""
    count = (1 << 30) if device.type == "cuda" else (1 << 28)
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * count / _median_seconds(lambda: target.copy_(source), device, repeats)


def _median_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    found = []
    for _ in range(repeats + 1):  # the first warms up
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])
