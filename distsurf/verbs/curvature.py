"""``curvature``: what the Hessian of a model's loss is like where the model stands."""

from __future__ import annotations

import argparse
import math
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from distsurf.errors import InputError
from distsurf.verbs.shared import own_command, read_job

if TYPE_CHECKING:
    from distsurf.job import Job
    from distsurf.objective.curvature import Curvature
    from distsurf.objective.lanczos import Ends

DENSITY_PROBES, DENSITY_STEPS = 5, 60
"""Random vectors, and products for each, for the spectral density."""
RISE = 1.0
"""How much the quadratic approximation rises to the edges of the plane along two eigenvectors, at least."""
POINTS = 31


def curvature(options: argparse.Namespace) -> int:
    """Measure, print a table; write vectors and draw the density where asked."""
    from distsurf.objective.sharpness import asam, average_case, keskar, sam
    from distsurf.view.figures import checked, save
    from distsurf.view.spectrum import spectrum

    job = _job(options)
    for name in ("rho", "asam_rho", "epsilon"):
        if not 0 < getattr(options, name) < math.inf:
            raise InputError(f"--{name.replace('_', '-')}: expected a positive number")
    if options.density is not None:
        checked(options.density)
    with _at_the_model(job) as (measured, samples, column):
        loss = measured.loss()
        print(f"{column} of {measured.dimension:,} parameters, {samples:,} samples")
        _row(column, loss)
        _row("gradient norm", float(measured.gradient().norm()))
        ends = measured.ends(options.top, want_vectors=True)
        _tell(ends)
        trace = measured.trace(ends)
        _row("trace", trace.value, f"± {trace.error:.2g} (standard error)")
        _row(f"sharpness, SAM, ρ = {options.rho:g}", sam(measured, options.rho))
        _row(f"sharpness, ASAM, ρ = {options.asam_rho:g}", asam(measured, options.asam_rho))
        _row(f"sharpness, Keskar, ε = {options.epsilon:g}", keskar(measured, options.epsilon))
        assert job.curvature is not None
        average = average_case(measured, options.rho, job.curvature.probes)
        _row(
            f"average case, ρ = {options.rho:g} |w|", average.value, f"± {average.error:.2g} (standard error)"
        )
        if options.vectors is not None:
            _write(options.vectors, job, measured, ends, loss)
        if options.density is not None:
            found = measured.density(DENSITY_PROBES, DENSITY_STEPS)
            save(spectrum(found, column), options.density)
            print(options.density)
    return 0


def _job(options: argparse.Namespace) -> Job:
    is_job = options.model.suffix == ".toml"
    if is_job == (options.job is not None):
        raise InputError("expected JOB.toml, or a CHECKPOINT with --job JOB.toml")
    job = read_job(options.model if is_job else options.job, options.set)
    table = job.model_dump(exclude_none=True, by_alias=True)
    table.setdefault("curvature", {})
    # The plane does not matter, and its other checkpoints need not be there.
    table["directions"], table["grid"] = {}, {"x": "0:0:1"}
    if not is_job:
        table["model"]["checkpoint"] = str(options.model)
        table.pop("train", None)
    return type(job).build(table)


@contextmanager
def _at_the_model(job: Job) -> Iterator[tuple[Curvature, int, str]]:
    """The derivatives at the model itself, how many samples they are of, and what the loss is called."""
    import numpy as np

    from distsurf import assemble
    from distsurf.distribute.placement import place
    from distsurf.distribute.ranks import Ranks
    from distsurf.objective.curvature import Curvature
    from distsurf.run import evaluator_of, prepare, wish_of

    placement = place(Ranks(), job.run.device, job.run.threads)
    assemble.check_names(job)
    model, objective = assemble.build_model(job, None), assemble.build_objective(job, None)
    prepared = prepare(job, model, objective, None, placement, None, lambda line: print(line, flush=True))
    placement.apply()
    assert job.curvature is not None
    assert prepared.curved is not None
    with evaluator_of(job, model, prepared, objective, placement) as evaluator:
        measured = Curvature(evaluator, prepared.curved, wish_of(job.curvature), prepared.subspace)
        measured.verify()
        samples = prepared.curved.samples
        if job.curvature.samples:
            samples = min(samples, job.curvature.samples)
        with measured:
            measured.move_to(np.zeros(1))
            yield measured, samples, evaluator.columns[0].name


def _tell(ends: Ends) -> None:
    for name, values, residuals in (
        ("λmax", ends.high, ends.high_residuals),
        ("λmin", ends.low, ends.low_residuals),
    ):
        for k, (value, residual) in enumerate(zip(values, residuals, strict=True)):
            _row(name if k == 0 else f"  and {k + 1}", float(value), f"residual {residual:.1g}")
    low, high = float(ends.low[0]), float(ends.high[0])
    _row("|λmin/λmax|", abs(low / high) if high else math.nan)
    if ends.converged:
        print(f"found in {ends.products} Hessian-vector products")
    else:
        print(f"NOT found to the tolerance in {ends.products} products: raise curvature.products")


def _row(name: str, value: float, remark: str = "") -> None:
    print(f"{name:28} {value:12.6g}  {remark}".rstrip(), flush=True)


def _write(folder: Path, job: Job, measured: Curvature, ends: Ends, loss: float) -> None:
    """Directions of length 1, and the job of the plane along the first of either end."""
    import numpy as np

    from distsurf.direction_files import write_direction
    from distsurf.files import replacing
    from distsurf.job import Job

    assert ends.high_vectors is not None
    assert ends.low_vectors is not None
    layout = measured.subspace.layout
    paths = []
    for end, vectors in (("top", ends.high_vectors), ("bottom", ends.low_vectors)):
        for k, vector in enumerate(vectors):
            paths.append(folder / f"{end}{k + 1}.safetensors")
            write_direction(paths[-1], layout, vector.cpu().numpy().astype(np.float32))
    table = job.model_dump(exclude_none=True, by_alias=True)
    axes = {"x": ("top1", float(ends.high[0])), "y": ("bottom1", float(ends.low[0]))}
    reach = {
        axis: math.sqrt(2 * max(RISE, loss) / max(abs(value), 1e-12)) for axis, (_, value) in axes.items()
    }
    table |= {
        "name": f"{job.name}-eigenvectors",
        "directions": {
            axis: {"kind": "file", "file": str(folder / f"{name}.safetensors")}
            for axis, (name, _) in axes.items()
        },
        "grid": {axis: f"{-size:.3g}:{size:.3g}:{POINTS}" for axis, size in reach.items()},
        "output": {**table["output"], "file": str(folder / "surface.h5")},
    }
    table.pop("curvature")
    with replacing(folder / "job.toml") as temporary:
        temporary.write_text(Job.build(table).to_toml())
    print(f"{', '.join(str(path) for path in paths)}: eigenvectors, as directions")
    print(
        f"the plane along the first of either end: {own_command()} run {shlex.quote(str(folder / 'job.toml'))}"
    )
