"""What can be typed after ``distsurf``: verbs, their options and their help."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

from distsurf import __version__
from distsurf.errors import InputError
from distsurf.names import nearest

FORMATS = ("li2018", "npz", "csv", "json", "vtk", "netcdf")
ROUTES = ("gram", "lapack", "randomized")
Verb = Callable[[argparse.Namespace], int]

OVERVIEW = """\
The loss surface of a neural network on a grid, on one core or many GPUs.

  distsurf run                   the built-in example; run my.toml: your own job
  mpirun -n 8 distsurf run my.toml   on 8 ranks; the same command continues it
  distsurf run my.toml --ranks 8 --restarts 5   the same, again if it dies
  distsurf status surface.h5     what is in a surface file, finished or not
  distsurf plot surface.h5       draw it
  distsurf check surface.h5      is the file sound and complete? (--repair)
  distsurf submit my.toml --array 16   on a SLURM cluster; then: status runs/my
  distsurf plan my.toml --ranks 64   how long it will take, and what memory
  distsurf trajectory "c/*.pt" --job my.toml   the loss around a training's path
  distsurf curvature my.toml     the model's Hessian (svd: a surface's ranks)
  distsurf export surface.h5 --to vtk   for other programs (import: Li et al.'s)
  distsurf bench my.toml         how fast it is beside other ways to do it

`distsurf VERB --help` lists a verb's options. A job file names a model, data
and a grid (a job file can name Python code: run only those you trust):

  [model]
  factory = "mynet.py:build"     # or resnet20, torchvision:resnet18, a.b:Net
  checkpoint = "trained.pt"
  [data]
  source = "mydata.py:splits"    # returns {"train": (inputs, targets), ...}
  [grid]
  x = "-1:1:51"
  y = "-1:1:51"

Exit codes: 0 complete, 1 bad input, 3 incomplete but saved, 4 damaged file."""


class _Parser(argparse.ArgumentParser):
    """Errors in one line, with exit code 1, like all bad input."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (distsurf --help shows what there is)")


def parse(arguments: list[str], verbs: Mapping[str, Verb]) -> argparse.Namespace:
    """The options of a command line, with the verb's own function in ``verb``. Raises InputError for what is wrong."""
    parser = _Parser(
        prog="distsurf",
        description=OVERVIEW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="distsurf VERB …",
        add_help=False,
    )
    parser.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)
    parser.add_argument(
        "--version", action="version", version=f"distsurf {__version__}", help=argparse.SUPPRESS
    )
    known = parser.add_subparsers(help=argparse.SUPPRESS, parser_class=_Parser)
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def verb(name: str, text: str) -> argparse.ArgumentParser:
        sub = known.add_parser(name, prog=f"distsurf {name}", help=text, description=text, parents=[common])
        sub.set_defaults(verb=verbs[name], takes_more=False)
        return sub

    run = verb("run", "Evaluate a job's surface, or continue it; in one process or under mpirun.")
    run.add_argument("job", nargs="?", type=Path, metavar="JOB.toml", help="without it: the built-in example")
    run.add_argument("--out", metavar="FILE.h5", help="the surface file (default: runs/NAME/surface.h5)")
    _add_set(run)
    run.add_argument(
        "--fresh", action="store_true", help="start anew; an existing file is kept under another name"
    )
    run.add_argument(
        "--plain",
        action="store_true",
        help="evaluate the model as it is, without looking for faster ways to the same values",
    )
    run.add_argument(
        "--shard",
        metavar="I/N",
        help="only every N-th point, from the I-th (0 to N-1) on, into a file of its own; in a SLURM array 0-N each "
        "task does its shard by itself (0/1: the whole job)",
    )
    run.add_argument(
        "--known",
        type=Path,
        metavar="THEIRS.h5",
        help="take the points of a surface of Li et al.'s code, if weights, directions and data are the same",
    )
    run.add_argument("--ranks", type=_count, default=0, metavar="N", help="start mpirun with N ranks")
    run.add_argument(
        "--under", metavar="COMMAND", help='start the ranks by this command: "srun --mpi=pmi2", "mpirun -n 8"'
    )
    run.add_argument(
        "--restarts",
        type=_count,
        default=0,
        metavar="K",
        help="when the ranks end early, start them again, up to K times, while the surface advances",
    )
    run.add_argument(
        "--requeues",
        type=_count,
        default=0,
        metavar="K",
        help="in a SLURM job: at the end of its walltime, or when it is preempted, put it back into the queue, up to K "
        "times for each",
    )
    run.add_argument("--progress", choices=("auto", "bar", "lines", "none"), default="auto")
    run.add_argument("--no-pictures", action="store_true", help="leave the pictures out")

    plot = verb("plot", "Draw a surface file, finished or not.")
    plot.add_argument("file", type=Path, metavar="FILE.h5")
    plot.add_argument("--column", default="loss", help="which quantity (default: loss)")
    _repeat(plot)
    plot.add_argument(
        "--kind",
        choices=("contour", "surface", "curves", "slices"),
        help="default: what fits the number of axes",
    )
    plot.add_argument("-o", "--output", type=Path, help=".png, .pdf or .svg (default: beside the file)")
    plot.add_argument("--title")
    scale = plot.add_mutually_exclusive_group()
    scale.add_argument(
        "--log", action="store_true", default=None, help="log scale (default: where the range asks for it)"
    )
    scale.add_argument("--linear", action="store_false", dest="log", default=None, help="linear scale")

    status = verb("status", "Say what is in a surface file, finished or not.")
    status.add_argument(
        "file", type=Path, metavar="FILE.h5|FOLDER", help="of a folder: every shard of its surfaces"
    )

    check = verb(
        "check", "Check that a surface file is sound: exit code 0 complete, 3 incomplete, 4 damaged."
    )
    check.add_argument("file", type=Path, metavar="FILE.h5")
    check.add_argument(
        "--repair",
        action="store_true",
        help="write what can be trusted of a damaged file to a new one; the file itself stays as it is",
    )
    check.add_argument("-o", "--output", type=Path, help="the repaired file (default: NAME.repaired-1.h5)")

    merge = verb(
        "merge",
        "Put the files of a job's shards together: exit code 0 complete, 3 with what is missing as --array has it.",
    )
    merge.add_argument(
        "whole", type=Path, metavar="JOB.toml|SURFACE.h5", help="the job, or the file to write"
    )
    merge.add_argument(
        "shards", nargs="*", type=Path, metavar="SHARD.h5", help="default: all that lie beside it"
    )
    _add_set(merge)
    merge.add_argument("--no-pictures", action="store_true", help="leave the pictures out")
    merge.add_argument(
        "--remove",
        action="store_true",
        help="remove the shards once the surface is complete and has been checked",
    )

    submit = verb(
        "submit",
        "Write batch scripts for SLURM beside the surface and submit them: an array of shards with its merge, or one "
        "MPI job over nodes. Every other option is sbatch's, and goes into the scripts: --partition gpu --account me.",
    )
    submit.set_defaults(takes_more=True)
    submit.allow_abbrev = False
    submit.add_argument("job", type=Path, metavar="JOB.toml")
    how = submit.add_mutually_exclusive_group()
    how.add_argument(
        "-a", "--array", metavar="N[%M]", help="N shards, M at a time (default: what distsurf plan says)"
    )
    how.add_argument("-N", "--nodes", type=_positive, metavar="N", help="one MPI job over N nodes")
    how.add_argument(
        "--missing",
        action="store_true",
        help="merge what there is, and send the shards that miss points again, with a new merge",
    )
    submit.add_argument(
        "--gpus-per-node",
        type=_gpus,
        default=("", 0),
        metavar="[TYPE:]G",
        help="and as many ranks on each node",
    )
    submit.add_argument(
        "-t", "--time", metavar="TIME", help="walltime (default: twice what distsurf plan says)"
    )
    submit.add_argument("--requeues", type=_count, metavar="K", help="see distsurf run (default: 20)")
    submit.add_argument("--out", metavar="FILE.h5", help="the surface file (default: runs/NAME/surface.h5)")
    _add_set(submit)
    submit.add_argument("--dry-run", action="store_true", help="print the scripts; write and submit nothing")

    path = verb(
        "trajectory",
        "The principal plane of a training's checkpoints, in training order; with a job, the loss around their path. "
        "In one process, or under mpirun with the parameters shared out.",
    )
    path.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT", help='files, or a pattern in quotes: "c/*.pt"'
    )
    path.add_argument(
        "--job", type=Path, metavar="JOB.toml", help="with the model, data and objective of the surface"
    )
    _add_set(path)
    path.add_argument(
        "--center", default="last", help="the plane goes through first, last (default), or a checkpoint"
    )
    path.add_argument(
        "--plane",
        type=Path,
        metavar="FILE.safetensors",
        help="where the checkpoints lie in a plane that was written before, moved to the centre",
    )
    path.add_argument(
        "--about",
        choices=("center", "mean"),
        default="center",
        help="components about the centre (default), or about the checkpoints' mean, as scikit-learn's PCA",
    )
    path.add_argument(
        "--scale",
        choices=("none", "center"),
        default="none",
        help="axes in units of the weights (default), or of the centre's norm (Ding et al. 2023)",
    )
    path.add_argument(
        "--error",
        action="store_true",
        help="with --job: also the loss at every checkpoint against that at its projection (Ding et al. 2023)",
    )
    path.add_argument(
        "--points", type=_positive, default=31, metavar="N", help="of the surface, on each axis (31)"
    )
    path.add_argument("--out", type=Path, metavar="FOLDER", help="default: runs/NAME-trajectory")

    curvature = verb(
        "curvature",
        "Measure a model itself: gradient, ends of the Hessian's spectrum, trace, spectral density, sharpness.",
    )
    curvature.add_argument(
        "model", type=Path, metavar="JOB.toml|CHECKPOINT", help="a job's own model, or with --job another one"
    )
    curvature.add_argument(
        "--job", type=Path, metavar="JOB.toml", help="of a CHECKPOINT: its model, data and loss"
    )
    _add_set(curvature)
    curvature.add_argument(
        "--top", type=_positive, default=1, metavar="K", help="eigenvalues at either end (default: 1)"
    )
    curvature.add_argument(
        "--vectors",
        type=Path,
        metavar="FOLDER",
        help="write their eigenvectors as directions, and a job of a plane",
    )
    curvature.add_argument(
        "--density", type=Path, metavar="PICTURE", help="draw the spectral density (.png, .pdf or .svg)"
    )
    curvature.add_argument(
        "--rho",
        type=float,
        default=0.05,
        metavar="R",
        help="radius of SAM's and average-case sharpness (0.05)",
    )
    curvature.add_argument(
        "--asam-rho", type=float, default=0.5, metavar="R", help="radius of ASAM's sharpness (0.5)"
    )
    curvature.add_argument(
        "--epsilon", type=float, default=1e-3, metavar="E", help="size of Keskar's box (0.001)"
    )

    svd = verb(
        "svd",
        "Decompose a surface with two axes, or any matrix, by singular values: which rank approximates it how well.",
    )
    svd.add_argument("file", type=Path, metavar="FILE", help=".h5; or .npy, .png of grey levels")
    svd.add_argument("--column", default="loss", help="of a surface (default: loss)")
    _repeat(svd)
    svd.add_argument("--log", action="store_true", help="decompose the logarithm (base 10)")
    svd.add_argument("--rank", type=_positive, metavar="K", help="to draw (default: the first within 1 %%)")
    svd.add_argument("--route", choices=ROUTES, help="default: by size")
    svd.add_argument("-o", "--output", type=Path, help=".png, .pdf or .svg (default: beside the file)")
    svd.add_argument("--title")

    imported = verb("import", "Read a surface of Li et al.'s public code (xcoordinates, train_loss, …).")
    imported.add_argument("file", type=Path, metavar="THEIRS.h5")
    imported.add_argument("-o", "--output", type=Path, help="default: NAME.imported.h5")

    exported = verb("export", "Write a surface for other programs.")
    exported.add_argument("file", type=Path, metavar="FILE.h5")
    exported.add_argument(
        "--to",
        required=True,
        choices=FORMATS,
        help="li2018: for Li et al.'s plotting scripts; vtk: for ParaView",
    )
    exported.add_argument(
        "--height", metavar="COLUMN", help="vtk: lift the points by a column, scaled to the width"
    )
    _repeat(exported)
    exported.add_argument("-o", "--output", type=Path, help="default: beside the file")

    bench = verb(
        "bench",
        "Measure a job's speed beside the textbook's loop, the best plain loop, and the machine's limits.",
    )
    bench.add_argument(
        "job",
        nargs="?",
        metavar="JOB.toml",
        help="or resnet56 (default), vgg9, resnet20 on images of CIFAR's shape",
    )
    _add_set(bench)
    bench.add_argument("--precision", default="fp32", help="of distsurf, one or several: fp32,bf16")
    bench.add_argument(
        "--steps", action="store_true", help="also show what each step of the fast path brings"
    )
    bench.add_argument("--samples", type=int, help="images, for the built-in networks (2000)")
    bench.add_argument("--rounds", type=int, default=5, help="points that each way evaluates (5)")
    bench.add_argument("--threads", type=int, default=0, help="CPU threads (default: all cores)")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write every measurement there")

    plan = verb(
        "plan", "Predict a job's time, memory and a good number of shards, by measuring a few points."
    )
    plan.add_argument(
        "job", nargs="?", type=Path, metavar="JOB.toml", help="without it: the built-in example"
    )
    _add_set(plan)
    plan.add_argument("--ranks", type=int, default=1, help="how many there will be (1)")
    plan.add_argument(
        "--ranks-per-node",
        type=int,
        default=0,
        help="default: one per GPU, or per core where there is no GPU",
    )
    plan.add_argument(
        "--threads", type=int, default=0, help="CPU threads per rank (default: cores / ranks per node)"
    )
    plan.add_argument("--json", action="store_true", help="print JSON")

    if not arguments:
        parser.print_help()
        raise SystemExit(0)
    if not arguments[0].startswith("-") and arguments[0] not in verbs:
        raise InputError(f"no verb {arguments[0]!r}; {nearest(arguments[0], verbs)}")
    options, more = parser.parse_known_args(arguments)
    if more and not options.takes_more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    options.more = more
    return options


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, 0 or more")
    return int(text)


def _repeat(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--repeat",
        type=int,
        metavar="NUMBER",
        help="one plane of a surface with directions.repeat, from 0 on",
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, 1 or more")
    return int(text)


def _gpus(text: str) -> tuple[str, int]:
    kind, colon, number = text.rpartition(":")
    return kind + colon, _count(number)


def _add_set(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="override a value of the job, for example grid.x=-1:1:21; may be repeated",
    )
