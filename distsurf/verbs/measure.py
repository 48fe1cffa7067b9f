"""Verbs that measure: ``bench`` and ``plan``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from distsurf.errors import InputError
from distsurf.verbs.shared import read_job


def bench(options: argparse.Namespace) -> int:
    """Measure a job beside other ways to do it."""
    import json

    from distsurf.bench import compare
    from distsurf.output import require_writable

    if options.rounds < 1 or (options.samples is not None and options.samples < 1):
        raise InputError("--rounds and --samples: expected 1 or more")
    if options.json is not None:
        require_writable(options.json)
    if options.job is None or options.job in compare.NETWORKS:
        job = compare.built_in(options.job or compare.NETWORKS[0], options.samples or 2000, options.set)
    else:
        if options.samples is not None:
            raise InputError("--samples is for the built-in networks; a job file brings its own data")
        if not Path(options.job).exists():
            names = ", ".join(compare.NETWORKS)
            raise InputError(f"{options.job!r} is no job file, and no built-in network ({names})")
        job = compare.with_weights(read_job(Path(options.job), options.set))
    precisions = compare.parse_precisions(options.precision)
    result = compare.bench(
        job,
        precisions,
        options.rounds,
        options.threads,
        lambda line: print(line, file=sys.stderr),
        each_step=options.steps,
    )
    print("\n".join(compare.table(result)))
    if options.json is not None:
        from distsurf.files import replacing

        with replacing(options.json) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def plan(options: argparse.Namespace) -> int:
    """Predict what a job takes."""
    import json

    from distsurf.bench.compare import with_weights
    from distsurf.bench.plan import plan

    if options.ranks < 1:
        raise InputError("--ranks: expected 1 or more")
    job = read_job(options.job, options.set)
    measured = with_weights(job)
    forecast = plan(measured, options.ranks, options.ranks_per_node, options.threads)
    if options.json:
        print(json.dumps(forecast.told()))
        return 0
    print("\n".join(forecast.lines()))
    if measured is not job:
        print(f"not counted: the training that makes {job.model.checkpoint}")
    return 0
