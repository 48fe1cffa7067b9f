"""``distsurf submit`` on a real SLURM: arrays, merges, preemption, walltime, lost nodes; equal to one process."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from distsurf.surface import Surface
from tests.cluster.slurm import IsolatedSlurm, Slurm
from tests.conftest import ROOT, Ended, Processes

NET = """
import os, time
import torch
from torch import nn

def net():
    if "SLURM_RESTART_COUNT" not in os.environ:
        time.sleep(float(os.environ.get("SET_UP", "0")))
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

def data():
    g = torch.Generator().manual_seed(0)
    return torch.randn(40, 4, generator=g), torch.randint(3, (40,), generator=g)

def objective(model, batch):
    time.sleep(float(os.environ.get("SLOW", "0")))
    return {"loss": (nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[0]))}
"""
JOB = """
name = "net"
[model]
factory = "net.py:net"
[data]
source = "net.py:data"
batch_size = 40
[objective]
function = "net.py:objective"
[run]
threads = 1
fast = false
[grid]
x = "-1:1:12"
y = "-1:1:10"
"""
POINTS = 120


class Site:
    """A folder with a job, on a cluster."""

    def __init__(self, slurm: Slurm, processes: Processes):
        self.slurm, self.folder = slurm, processes.folder
        self._processes = processes
        (self.folder / "net.py").write_text(NET)
        (self.folder / "job.toml").write_text(JOB)
        self.whole = self.folder / "runs/net/surface.h5"

    def distsurf(self, *arguments: object, slow: float = 0, set_up: float = 0) -> Ended:
        """Run a command; jobs that it submits take ``slow`` seconds per point, and ``set_up`` to begin with."""
        command = [sys.executable, "-m", "distsurf", *arguments]
        environment = {
            **self.slurm.environment,
            "SLOW": str(slow),
            "SET_UP": str(set_up),
            "PYTHONPATH": str(ROOT),
        }
        return self._processes.end(self._processes.start(*command, env=environment))

    def submit(self, *arguments: object, **delays: float) -> int:
        ended = self.distsurf("submit", "job.toml", "--time", "10", *arguments, **delays)
        assert ended.code == 0, ended.err
        found = re.search(r"job (\d+)", ended.out)
        assert found is not None
        return int(found[1])

    def wait_for(self, condition: Callable[[], bool], seconds: float = 150) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, (self.queue(), self.logs())
            time.sleep(0.2)

    def queue(self) -> str:
        return self.slurm.ask("squeue", "-h", "-r", "-o", "%i %T %r")

    def wait_until_done(self) -> None:
        self.wait_for(lambda: not self.queue())

    def logs(self) -> str:
        return "\n".join(
            f"{path.name}: {path.read_text()}" for path in sorted(self.folder.glob("runs/net/slurm/*.log"))
        )

    def points(self, path: Path | None = None) -> int:
        """How many points a file has, or all shards together."""
        paths = [path] if path else list(self.folder.glob("runs/net/surface*.h5"))
        surfaces = [Surface.load(path) for path in paths if path.exists()]
        return sum(surface.size - len(surface.missing) for surface in surfaces)

    def require_truth(self) -> None:
        """The surface is that of one undisturbed process."""
        assert self.distsurf("run", "job.toml", "--out", "one.h5", "--no-pictures").code == 0
        found, one = Surface.load(self.whole), Surface.load(self.folder / "one.h5")
        assert found.complete, self.logs()
        for name in one.names:
            assert found[name].tobytes() == one[name].tobytes()


@pytest.fixture
def site(slurm: Slurm, processes: Processes) -> Iterator[Site]:
    yield Site(slurm, processes)
    slurm.ask("scancel", "--user=root")


def test_an_array_with_its_merge(site: Site) -> None:
    array = site.submit("--array", "8%4")
    site.wait_for(lambda: site.points() > 0)
    told = site.distsurf("status", "runs/net").out
    assert "8 shards of runs/net/surface.h5:" in told
    assert re.search(rf"{array}_\d+ (RUNNING|PENDING|COMPLETED)", told), told
    site.wait_until_done()
    site.require_truth()
    assert "120 of 120 points, from 8 files" in site.logs()
    assert "8 complete; 120 of 120 points" in site.distsurf("status", "runs/net").out


def test_a_cancelled_task_is_named_and_sent_again(site: Site) -> None:
    array = site.submit("--array", "3", slow=0.3)
    site.wait_for(lambda: site.points(site.folder / "runs/net/surface.shard-1-of-3.h5") > 2)
    site.slurm.ask("scancel", f"{array}_1")
    site.wait_until_done()  # it must not come back by itself
    assert "missing: --array=1 (of 3 shards)" in site.logs()
    assert "was cancelled, and is not requeued" in site.logs()
    assert 80 < site.points(site.whole) < 120
    checked = site.distsurf("check", "runs/net/surface.h5")
    assert (checked.code, "missing: --array=1 (of 3 shards)" in checked.out) == (3, True)
    site.submit("--missing")
    site.wait_until_done()
    site.require_truth()
    assert "nothing is missing" in site.distsurf("submit", "job.toml", "--missing").out


def test_one_job_over_two_nodes(site: Site) -> None:
    """srun within an allocation over two nodes: four ranks that are one job."""
    site.submit("--nodes", 2, "--ntasks-per-node", 2)
    site.wait_until_done()
    assert "4 ranks on" in site.logs()
    site.require_truth()


@pytest.mark.parametrize("partition", ["lo", "grace"])
def test_a_preempted_job_comes_back(site: Site, partition: str) -> None:
    """At once requeued by SLURM itself, or, with time to go, from within the job."""
    site.submit("--nodes", 1, "--ntasks", 2, "--partition", partition, slow=0.1)
    site.wait_for(lambda: site.points(site.whole) > 5)
    site.slurm.ask("sbatch", "-p", "hi", "-N2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    site.wait_until_done()
    site.require_truth()
    assert "restart 1 (SLURM_RESTART_COUNT); requeued: 1 for preemption" in site.logs()
    assert not list(site.whole.parent.glob(".*"))


def test_a_job_comes_back_after_its_walltime(site: Site) -> None:
    """Also if it ends before the first point: the first start gets no further than that."""
    site.submit("--nodes", 1, "--time", "00:01:00", "--signal", "USR2@35", slow=0.3, set_up=60)
    site.wait_until_done()
    site.require_truth()
    assert "is requeued for end of its walltime (1 for end of its walltime)" in site.logs()
    assert "restart 2 (SLURM_RESTART_COUNT); requeued: 2 for end of its walltime" in site.logs()
    assert "death" not in site.logs()


def test_a_node_that_goes_down(site: Site) -> None:
    """SLURM starts the job on the other node while the old one may still run: one of them writes."""
    job = site.submit("--nodes", 1, slow=0.1)
    site.wait_for(lambda: site.points() > 10)
    node = site.slurm.ask("squeue", "-h", "-j", job, "-o", "%N")
    site.slurm.ask("scontrol", "update", f"node={node}", "state=down", "reason=test")
    try:
        site.wait_until_done()
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):  # it may have come back by itself
            site.slurm.ask("scontrol", "update", f"node={node}", "state=resume")
    site.require_truth()
    assert "restart 1 (SLURM_RESTART_COUNT)" in site.logs()


def test_a_refused_job_leaves_nothing(site: Site) -> None:
    ended = site.distsurf("submit", "job.toml", "--array", 2, "--time", 5, "--partition", "nowhere")
    assert ended.code == 1
    assert "sbatch refused" in ended.err
    assert "invalid partition" in ended.err
    assert site.queue() == ""
    site.distsurf("submit", "job.toml", "--array", 2, "--time", 5, "--hold")
    site.slurm.ask("scancel", "--user=root")
    site.wait_until_done()
    merge = site.folder / "runs/net/slurm/merge.sbatch"
    merge.write_text(merge.read_text().replace("#SBATCH --ntasks=1", "#SBATCH --partition=nowhere"))
    ended = site.distsurf("submit", "job.toml", "--missing")
    assert ended.code == 1
    assert "was cancelled" in ended.err
    site.wait_until_done()


def test_mpirun_in_an_allocation_over_two_nodes(slurm: Slurm, processes: Processes) -> None:
    """And srun over two nodes: `tests.cluster.test_slurm`."""
    path = processes.folder / "s.h5"
    environment = {
        **slurm.environment,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    allocate = ("salloc", "-N", 2, "-n", 4, "--ntasks-per-node=2")
    command = ("mpirun", "-n", 4, sys.executable, "-m", "tests.faults.runner", path, "good")
    ended = processes.end(processes.start(*allocate, *command, env=environment))
    assert ended.code == 0, (ended.out, ended.err)
    assert "points/s" in ended.out
    assert Surface.load(path).complete


@pytest.mark.parametrize("how", ["crash", "cut"])
def test_a_node_that_is_lost(isolated_slurm: IsolatedSlurm, processes: Processes, how: str) -> None:
    """SLURM starts the job again on the other node. One that is cut off works on, and is waited for, or goes on."""
    site = Site(isolated_slurm, processes)
    job = site.submit("--nodes", 1, slow=0.2)
    site.wait_for(lambda: site.points() > 10)
    node = site.slurm.ask("squeue", "-h", "-j", job, "-o", "%N")
    getattr(isolated_slurm, how)(node)
    begun = site.points()
    site.wait_for(lambda: "restart 1 (SLURM_RESTART_COUNT)" in site.logs(), 240)
    site.wait_until_done()
    site.require_truth()
    if how == "cut":
        assert begun < 120
        isolated_slurm.mend(node)
