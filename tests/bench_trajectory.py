"""What the plane of many large checkpoints costs in memory and time.

    python -m tests.bench_trajectory [CHECKPOINTS [MILLION_PARAMETERS]]     (50 and 25; on two ranks: mpirun -n 2 …)

Files are links to eight different checkpoints, so that the disk holds only those. Prints the growth of anonymous memory
on each rank (pages of mapped files are the kernel's to drop), and the time beside that of reading everything once.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path
from types import TracebackType

import torch
from safetensors.torch import save_file

from distsurf.distribute.ranks import connected
from distsurf.subspace.checkpoints import Checkpoints, each
from distsurf.subspace.trajectory import principal_plane

DIFFERENT = 8


class Growth:
    """The most anonymous memory that this process had within the block, beyond that at its beginning, in MiB."""

    def __enter__(self) -> Growth:
        self.mib, self._is_over = 0.0, threading.Event()
        before = _anonymous()
        self._thread = threading.Thread(target=self._watch, args=(before,))
        self._thread.start()
        return self

    def _watch(self, before: float) -> None:
        while not self._is_over.wait(0.01):
            self.mib = max(self.mib, _anonymous() - before)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_over.set()
        self._thread.join()


def _anonymous() -> float:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line]
    return int(line.split()[1]) / 1024


def _write(folder: Path, count: int, millions: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        path = folder / f"{i:04}.safetensors"
        if i < DIFFERENT:
            layers = {f"layer{k}": torch.randn(1000, 1000, generator=generator) for k in range(millions)}
            save_file(layers, path)
        else:
            os.link(folder / f"{i % DIFFERENT:04}.safetensors", path)


def main() -> None:
    """Write, read, decompose, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoints", type=int, nargs="?", default=50)
    parser.add_argument("millions", type=int, nargs="?", default=25)
    wish = parser.parse_args()
    with connected() as ranks, tempfile.TemporaryDirectory() as own:
        folder = Path(ranks.broadcast(own))
        with ranks.together():
            if ranks.rank == 0:
                _write(folder, wish.checkpoints, wish.millions)
        with Checkpoints(sorted(folder.glob("*.safetensors"))) as checkpoints:
            start = time.perf_counter()
            for chunk in each(checkpoints.chunks(), ranks.rank, ranks.size):
                checkpoints.read(chunk)
            reading = time.perf_counter() - start
            start = time.perf_counter()
            with Growth() as growth:
                principal_plane(checkpoints, 0, rank=ranks.rank, size=ranks.size, total=ranks.total)
            whole = time.perf_counter() - start
        grown = ranks.gather(f"{growth.mib:.0f}")
        if ranks.rank == 0:
            size = wish.checkpoints * wish.millions * 4 / 1000
            print(f"{wish.checkpoints} checkpoints of {wish.millions} M parameters, {size:.1f} GB in all")
            print(f"memory grows by {', '.join(grown)} MiB on each rank, of which two directions are "
                  f"{wish.millions * 8 / 1.048576:.0f}")  # fmt: skip
            print(f"the plane takes {whole:.1f} s, reading everything once {reading:.1f} s")


if __name__ == "__main__":
    main()
