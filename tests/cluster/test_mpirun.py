"""Real jobs under a real mpirun: same bits for any number of ranks, no hang, no spinning."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distsurf.surface import Status, Surface
from tests.conftest import Processes

NET = """
import os, time
import torch
from torch import nn

def rank():
    return int(os.environ.get("PMI_RANK", 0))

def net():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(384, 3))

def data(n=257):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, 8, 8, generator=g)
    return {"train": (x, torch.randint(3, (n,), generator=g)), "test": (x[:50], torch.zeros(50, dtype=torch.int64))}

def net_broken_on_rank_2():
    if rank() == 2:
        raise OSError("this node has no such file")
    return net()

def large(width=16):
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, 3))

def large_and_wrong_on_rank_1():
    if rank() == 1:
        from dataclasses import replace
        from distsurf.objective.fast import steps
        def wrong(network, at, right=steps.STEPS["fold"]):
            folded = right(network, at)
            return replace(folded, subspace=replace(folded.subspace, center=folded.subspace.center * 1.5))
        steps.STEPS["fold"] = wrong
    return large()

def pictures(n=300):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 24, 24, generator=g), torch.randint(3, (n,), generator=g)

calls = 0

def sick_on_rank_1(model, batch):
    global calls
    calls += 1
    if rank() == 1 and calls > 10:  # healthy at first, so that it takes part
        raise MemoryError("rank 1 is out of memory")
    return slow(model, batch)

def slow(model, batch):
    time.sleep(0.02)
    return {"loss": (model(batch[0]).square().sum(), len(batch[0]))}
"""
JOB = """
name = "job"
[model]
factory = "net.py:net"
[data]
source = "net.py:data"
batch_size = 64
[run]
threads = 1
[grid]
x = "-1:1:9"
y = "-0.5:1:8"
"""
TUNED = """
# The job, with ranks that measure what they are told to, and a first run that stops half-way.
import sys
from distsurf import cli
from distsurf.objective.evaluator import ModelEvaluator

size = int(sys.argv[1])
from net import rank
ModelEvaluator.tune = lambda self, passes: size if rank() == 0 else 7
if size == 64:
    evaluate, done = ModelEvaluator._evaluate, []
    def failing(self, running, group):
        done.append(1)
        if len(done) > 3:
            raise MemoryError
        return evaluate(self, running, group)
    ModelEvaluator._evaluate = failing
sys.exit(cli.main(["run", *sys.argv[2:]]))
"""
RUN = ("-m", "distsurf.run", "job.toml", "--no-pictures", "--progress", "none")


@pytest.fixture
def job(processes: Processes) -> Processes:
    (processes.folder / "net.py").write_text(NET)
    (processes.folder / "job.toml").write_text(JOB)
    return processes


def _values(path: Path) -> dict[str, Any]:
    surface = Surface.load(path)
    assert surface.complete
    return {name: surface[name].tobytes() for name in surface.names}


def test_same_bits_for_any_number_of_ranks(job: Processes) -> None:
    surfaces = {}
    for ranks in (0, 1, 2, 3, 8):
        ended = job.python(*RUN, "--out", f"{ranks}.h5", ranks=ranks)
        assert ended.code == 0, ended.err
        surfaces[ranks] = _values(job.folder / f"{ranks}.h5")
    assert all(surface == surfaces[0] for surface in surfaces.values())
    fingerprints = {tuple(Surface.load(job.folder / f"{ranks}.h5").fingerprint.items()) for ranks in surfaces}
    assert len(fingerprints) == 1


def test_ranks_meet_the_models_that_span_the_surface(job: Processes) -> None:
    """A checkpoint on an axis is read by rank 0 alone, and its point is that model's on whichever rank."""
    saved = (
        "import torch, net; torch.manual_seed(9); m = net.net(); [p.data.normal_() for p in m.parameters()]; "
    )
    assert job.python("-c", saved + "torch.save(m.state_dict(), 'b.pt')").code == 0
    axis = ("--set", "directions.x.kind=difference", "--set", "directions.x.checkpoint=b.pt")
    for ranks in (0, 3):
        ended = job.python(*RUN, *axis, "--set", "grid.y=-1:1:3", "--out", f"{ranks}.h5", ranks=ranks)
        assert ended.code == 0, ended.err
    assert _values(job.folder / "0.h5") == _values(job.folder / "3.h5")
    surface = Surface.load(job.folder / "3.h5")
    assert surface.models == [("trained model", (0.0, 0.0)), ("b.pt", (1.0, 0.0))]
    alone = ("--set", "model.checkpoint=b.pt", "--set", "grid.x=0:0:1", "--set", "grid.y=0:0:1", "--plain")
    assert job.python(*RUN, *alone, "--out", "alone.h5").code == 0
    expected = Surface.load(job.folder / "alone.h5")
    np.testing.assert_allclose(surface["loss"][1, -1], expected["loss"][0, 0], rtol=1e-6)


LARGE = (*RUN, "--set", "data.source=net.py:pictures", "--set", "grid.x=-1:1:4", "--set", "grid.y=-1:1:3")


def test_ranks_evaluate_alike_or_plainly(job: Processes) -> None:
    """A step that is wrong on one rank alone is found by comparison with rank 0, and no rank uses any."""
    right = job.python(*LARGE, "--set", "model.factory=net.py:large", "--out", "a.h5", ranks=2)
    wrong = job.python(
        *LARGE, "--set", "model.factory=net.py:large_and_wrong_on_rank_1", "--out", "b.h5", ranks=2
    )
    plain = job.python(*LARGE, "--set", "model.factory=net.py:large", "--out", "c.h5", "--plain", ranks=2)
    for ended in (right, wrong, plain):
        assert ended.code == 0, ended.err
    a, b, c = (Surface.load(job.folder / name) for name in ("a.h5", "b.h5", "c.h5"))
    assert a.facts["evaluation"]["steps"] == ["fold", "channels_last", "fuse"]
    assert "fast path: fold, channels_last, fuse" in right.out
    assert b.facts["evaluation"]["steps"] == c.facts["evaluation"]["steps"] == []
    assert "no fast path: rank 1 on" in wrong.out
    assert "as on rank 0" in wrong.out
    assert b["loss"].tobytes() == c["loss"].tobytes() != a["loss"].tobytes()
    np.testing.assert_allclose(a["loss"], c["loss"], rtol=1e-5)


def test_batch_size_is_found_once_and_kept(job: Processes) -> None:
    """All ranks measure, rank 0's finding counts, and the file's after a resume."""
    found = (*LARGE, "--set", "data.batch_size=0", "--set", "model.factory=net.py:large", "--out", "s.h5")
    (job.folder / "tuned.py").write_text(TUNED)
    first = job.python("tuned.py", "64", *found[2:], ranks=3)
    assert first.code == 3, first.err
    part = Surface.load(job.folder / "s.h5")
    assert part.facts["evaluation"]["batch_size"] == 64
    assert part.fingerprint["batch_size"] == "64"
    second = job.python("tuned.py", "256", *found[2:], ranks=2)  # as if 256 were faster now
    assert second.code == 0, second.err
    assert Surface.load(job.folder / "s.h5").facts["evaluation"]["batch_size"] == 64
    whole = job.python(*found[:-1], "whole.h5", "--set", "data.batch_size=64")
    assert whole.code == 0, whole.err
    assert _values(job.folder / "s.h5") == _values(job.folder / "whole.h5")
    other = job.python(*found, "--set", "data.batch_size=100")
    assert other.code == 1
    assert "batch_size (file 64, this job 100)" in other.err


def test_ctrl_c_saves_and_another_number_of_ranks_continues(job: Processes) -> None:
    whole = job.python(*RUN, "--out", "whole.h5", "--set", "objective.function=net.py:slow", ranks=3)
    assert whole.code == 0, whole.err
    path = job.folder / "s.h5"
    slow = (*RUN, "--out", path, "--set", "objective.function=net.py:slow")
    running = job.start(*job.command(4), *slow)
    _until(lambda: path.exists() and Surface.load(path).count(Status.EVALUATED) >= 5)
    running.send_signal(signal.SIGINT)
    stopped = job.end(running, timeout=30)
    assert stopped.code == 3, stopped.err
    assert "stopped by SIGINT" in stopped.err
    assert "Traceback" not in stopped.err
    done = Surface.load(path).count(Status.EVALUATED)
    assert 5 <= done < 72
    ended = job.python(*slow, ranks=2)
    assert ended.code == 0, ended.err
    assert f"{done} of 72 points" in ended.out
    assert _values(path) == _values(job.folder / "whole.h5")


def test_signal_to_one_rank_stops_the_job(job: Processes) -> None:
    path = job.folder / "s.h5"
    running = job.start(*job.command(3), *RUN, "--out", path, "--set", "objective.function=net.py:slow")
    _until(lambda: path.exists() and Surface.load(path).count(Status.EVALUATED) >= 3)
    victim = _ranks_of(running.pid)[1]
    os.kill(victim, signal.SIGTERM)
    stopped = job.end(running, timeout=30)
    assert stopped.code == 3, stopped.err
    assert Surface.load(path).count(Status.EVALUATED) >= 3


def test_error_of_one_rank_ends_all_with_its_name(job: Processes) -> None:
    ended = job.python(*RUN, "--set", "model.factory=net.py:net_broken_on_rank_2", ranks=4, timeout=60)
    assert ended.code == 1
    assert "distsurf: rank 2: " in ended.err
    assert "OSError: this node has no such file" in ended.err
    assert "Traceback" not in ended.err


def test_points_that_fail_on_one_rank_are_done_by_others(job: Processes) -> None:
    healthy = job.python(*RUN, "--out", "a.h5", "--set", "objective.function=net.py:slow", ranks=2)
    sick = job.python(*RUN, "--out", "b.h5", "--set", "objective.function=net.py:sick_on_rank_1", ranks=3)
    assert healthy.code == 0, healthy.err
    assert sick.code == 0, sick.err
    assert _values(job.folder / "a.h5") == _values(job.folder / "b.h5")


def test_unfit_output_ends_all_ranks(job: Processes) -> None:
    """Known to rank 0 alone, and only when the others are about to ask for work."""
    small = ("--out", "s.h5", "--set", "grid.x=0:1:2", "--set", "grid.y=0:1:2")
    assert job.python(*RUN, *small, ranks=2).code == 0
    other = job.python(*RUN, *small, "--set", "directions.seed=9", ranks=3, timeout=60)
    assert other.code == 1
    assert "another job; what differs: directions" in other.err
    whole = (job.folder / "s.h5").read_bytes()
    (job.folder / "s.h5").write_bytes(whole[:3000])
    damaged = job.python(*RUN, *small, ranks=3, timeout=60)
    assert damaged.code == 4, damaged.err
    assert "should be" in damaged.err


BROKEN_FILE = """
from distsurf.surface import SurfaceFile
from distsurf.cli import main
import sys

def commit(self, count=[0]):
    count[0] += 1
    if count[0] > 2:
        raise RuntimeError("a bug in the file")

SurfaceFile.commit = commit
sys.exit(main(sys.argv[1:]))
"""


def test_error_of_the_recorder_ends_all_ranks(job: Processes) -> None:
    (job.folder / "broken.py").write_text(BROKEN_FILE)
    slow = ("job.toml", "--no-pictures", "--set", "objective.function=net.py:slow")
    ended = job.python("broken.py", "run", *slow, ranks=3, timeout=60)
    assert ended.code == 1
    assert "RuntimeError on" in ended.err
    assert "a bug in the file" in ended.err


def test_bad_input_is_said_once(job: Processes) -> None:
    ended = job.python(*RUN, "--set", "grid.x=1", ranks=3)
    assert ended.code == 1
    assert ended.err.count("distsurf:") == 1
    assert "Traceback" not in ended.err


SCRIPT = """
import sys, torch, distsurf
from net import net, data
torch.manual_seed(0)
model = net()
surface = distsurf.evaluate(model, data(), x="-1:1:5", y="0:1:4", threads=1, progress="none")
surface.save("script.h5")
surface.plot(path="script.png")
with open(f"seen-{__import__('os').environ.get('PMI_RANK', 'alone')}", "w") as file:
    file.write(f"{surface['loss'].sum():.17g} {surface.is_writer}")
"""


def test_same_script_alone_and_under_mpirun(job: Processes) -> None:
    (job.folder / "script.py").write_text(SCRIPT)
    alone = job.python("script.py")
    assert alone.code == 0, alone.err
    values = _values(job.folder / "script.h5")
    (job.folder / "script.h5").unlink()
    together = job.python("script.py", ranks=3)
    assert together.code == 0, together.err
    seen = {name: (job.folder / f"seen-{name}").read_text().split() for name in ("alone", "0", "1", "2")}
    assert {total for total, _ in seen.values()} == {seen["alone"][0]}
    assert [seen[rank][1] for rank in "012"] == ["True", "False", "False"]
    assert _values(job.folder / "script.h5") == values
    assert (job.folder / "script.png").exists()


WINDOW = """
import numpy as np, torch
from distsurf.distribute.parcel import distribute
from distsurf.distribute.ranks import connect

ranks = connect()
value = None
if ranks.rank == 0:
    value = {"big": torch.arange(6_000_000.0), "half": torch.ones(3, dtype=torch.bfloat16),
             "flags": torch.tensor([True]), "numpy": np.arange(5), "scalar": torch.tensor(2.5),
             "empty": torch.empty(0, 3), "text": ("a", [1])}
got = distribute(ranks, value)
assert got["big"].sum() == torch.arange(6_000_000.0).sum() and got["big"].data_ptr() % 64 == 0
assert got["half"].dtype == torch.bfloat16 and got["half"].sum() == 3 and bool(got["flags"])
assert np.array_equal(got["numpy"], np.arange(5)) and got["scalar"] == 2.5 and got["empty"].shape == (0, 3)
assert got["text"] == ("a", [1])
ranks.barrier()
if ranks.rank == 1:
    got["big"][3] = -1.0  # one copy per node: what one rank writes, the others see
ranks.barrier()
with open(f"seen-{ranks.rank}", "w") as file:  # a file each: mpirun mixes what ranks print
    file.write(f"{ranks.is_shared} {float(got['big'][3])}")
ranks.close()
"""


# MPICH's own way to treat the ranks of one machine as those of two nodes.
TWO_NODES = {"MPIR_CVAR_ODD_EVEN_CLIQUES": "1"}


@pytest.mark.parametrize("environment", [{}, TWO_NODES], ids=["one node", "two nodes"])
def test_large_arrays_are_one_copy_per_node(job: Processes, environment: dict[str, str]) -> None:
    (job.folder / "window.py").write_text(WINDOW)
    ended = job.end(job.start(*job.command(4), "window.py", env=environment))
    assert ended.code == 0, ended.err
    seen = {rank: (job.folder / f"seen-{rank}").read_text().split() for rank in range(4)}
    beside_rank_1 = {1, 3} if environment else {0, 1, 2, 3}
    assert seen == {rank: ["True", "-1.0" if rank in beside_rank_1 else "3.0"] for rank in range(4)}


def test_same_bits_with_the_data_in_shared_windows(job: Processes) -> None:
    options = (*RUN, "--set", "data.arguments={n=70000}", "--set", "grid.x=-1:1:2", "--set", "grid.y=0:0:1")
    alone = job.python(*options, "--out", "alone.h5")
    together = job.end(job.start(*job.command(4), *options, "--out", "together.h5", env=TWO_NODES))
    assert (alone.code, together.code) == (0, 0), alone.err + together.err
    assert "4 ranks" in together.out
    assert _values(job.folder / "alone.h5") == _values(job.folder / "together.h5")


WAITING = """
import time
from distsurf.distribute.ranks import connect, launched

rank = launched()[0]
if rank == 0:
    time.sleep(2)
ranks = connect()
if rank == 0:
    time.sleep(2)
ranks.broadcast("go")
if rank == 0:
    time.sleep(2)
ranks.barrier()
if rank == 1:
    time.sleep(2)
ranks.close()
if rank == 0:
    time.sleep(2)
"""
MEASURE = """
import resource, subprocess, sys, time
start = time.monotonic()
subprocess.run(sys.argv[1:], check=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print((used.ru_utime + used.ru_stime) / (time.monotonic() - start))
"""


def test_waiting_ranks_do_not_spin(job: Processes) -> None:
    """Four ranks that wait for one another for ten seconds, at start, in between and at the end of the script."""
    (job.folder / "waiting.py").write_text(WAITING)
    (job.folder / "measure.py").write_text(MEASURE)
    ended = job.python("measure.py", *job.command(4), "waiting.py")
    assert ended.code == 0, ended.err
    # Start-up alone takes 0.3. With MPI's own waits in place of ours it was 0.9.
    assert float(ended.out) < 0.6


def test_singletons_are_refused_with_the_remedy(job: Processes) -> None:
    for launcher, remedy in (
        ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"}, "use the mpirun of that library"),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, "--mpi=pmi2"),
    ):
        ended = job.end(job.start(*job.command(0), *RUN, env=launcher))
        assert ended.code == 1
        assert "started 4 processes, but this one (0) is alone" in ended.err
        assert remedy in ended.err
        assert ended.err.count("distsurf:") == 1


def test_missing_mpi_library_is_said_with_the_remedy(job: Processes) -> None:
    environment = {
        "OMPI_COMM_WORLD_RANK": "0",
        "OMPI_COMM_WORLD_SIZE": "2",
        "MPI4PY_LIBMPI": "/nowhere/libmpi.so",
    }
    ended = job.end(job.start(*job.command(0), *RUN, env=environment))
    assert ended.code == 1
    assert "pip install 'distsurf[mpich]'" in ended.err
    assert "Traceback" not in ended.err


def test_one_process_needs_no_mpi_library(job: Processes) -> None:
    ended = job.end(job.start(*job.command(0), *RUN, env={"MPI4PY_LIBMPI": "/nowhere/libmpi.so"}))
    assert ended.code == 0, ended.err


def _until(condition: Any, seconds: float = 60) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "the condition never came true"
        time.sleep(0.02)


def _ranks_of(launcher: int) -> list[int]:
    """The processes below a launcher that have a rank, in its order."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            environment = (entry / "environ").read_bytes().split(b"\0")
            ranks = [int(v.split(b"=")[1]) for v in environment if v.startswith(b"PMI_RANK=")]
            if ranks and launcher in _ancestors(int(entry.name)):
                found[ranks[0]] = int(entry.name)
        except OSError:  # it ended meanwhile
            continue
    return [found[rank] for rank in sorted(found)]


def _ancestors(process: int) -> Iterator[int]:
    while process > 1:
        process = int(Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[1])
        yield process


UNCAUGHT = """
import os, sys, torch, distsurf
from net import net, data
rank = int(os.environ["PMI_RANK"])
options = dict(x="0:1:2", threads=1, progress="none")
distsurf.evaluate(net(), data() if rank == 0 else None, **options)
if sys.argv[1] == "script" and rank == 1:
    raise RuntimeError("the user's own mistake")
if sys.argv[1] == "exit":
    leave = lambda model, batch: sys.exit("leaving") if rank == 2 else {"loss": (1.0, 1)}
    distsurf.evaluate(net(), data(), objective=leave, **options)
if sys.argv[1] == "differ":
    distsurf.evaluate(net(), data(), **(options | {"seed": rank}))
if sys.argv[1] == "model":
    distsurf.evaluate(net() if rank != 1 else torch.nn.Sequential(torch.nn.Linear(2, 2)), None, **options)
if sys.argv[1] == "input":
    distsurf.evaluate(net(), data(), "no_such_loss", **options)
distsurf.evaluate(net(), data() if rank == 0 else None, **options)
"""


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("script", "RuntimeError: the user's own"),
        ("exit", "rank 2: unexpected SystemExit on"),
        ("input", "InputError: no loss"),
        ("differ", "rank 1 was given another job"),
        ("model", "rank 1 has another model"),
    ],
)
def test_uncaught_exception_of_a_script_ends_every_rank(job: Processes, mistake: str, words: str) -> None:
    (job.folder / "script.py").write_text(UNCAUGHT)
    ended = job.python("script.py", mistake, ranks=3, timeout=60)
    assert ended.code != 0
    assert ended.err.count(words) == 1, ended.err


LATE = """
# Rank 0 comes to MPI's start late.
import os, sys, time
from pathlib import Path
from distsurf import cli
from distsurf.distribute import ranks
if os.environ["PMI_RANK"] == "0":
    ranks.connect = lambda: time.sleep(600)
Path(os.environ["PMI_RANK"]).touch()
sys.exit(cli.main(["run", *sys.argv[1:]]))
"""


@pytest.mark.parametrize("blow", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_ranks_that_wait_in_mpis_own_start(job: Processes, blow: signal.Signals) -> None:
    """Ctrl-C while one rank is not there yet: where the others wait no handler of Python's ever runs."""
    (job.folder / "late.py").write_text(LATE)
    process = job.start(*job.command(3), "late.py", "job.toml", "--no-pictures")
    while not all((job.folder / rank).exists() for rank in "012"):
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(2)  # from there into MPI_Init, where nothing can be seen of them
    os.killpg(process.pid, blow)
    job.end(process, timeout=30)


def test_a_rank_that_cannot_read_the_job_ends_all(job: Processes) -> None:
    """On its node the file is not there: the others are told, rather than waiting for it in MPI's start."""
    launcher = Path(sys.executable).parent / "mpirun"
    mine, other = (
        [sys.executable, "-m", "distsurf.run", f"{name}.toml", "--no-pictures"] for name in ("job", "none")
    )
    ended = job.end(
        job.start(launcher, "-n", 1, *mine, ":", "-n", 1, *other, ":", "-n", 1, *mine), timeout=60
    )
    assert ended.code == 1, ended.err
    assert "rank 1: " in ended.err
    assert "none.toml" in ended.err
