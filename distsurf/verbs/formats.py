"""Verbs for the formats of others: ``import`` and ``export``."""

from __future__ import annotations

import argparse

from distsurf.errors import InputError
from distsurf.verbs.shared import in_lines, load


def import_surface(options: argparse.Namespace) -> int:
    """Read a surface of the public code of Li et al. and write it as a surface file."""
    from distsurf.surface.formats import read_li2018

    path = options.output or options.file.with_name(f"{options.file.stem}.imported.h5")
    if path.exists():
        raise InputError(f"{path} exists; give another name with -o")
    surface = read_li2018(options.file)
    surface.save(path)
    print(f"{path}, from {options.file}")
    print("\n".join(in_lines(surface)))
    return 0


def export_surface(options: argparse.Namespace) -> int:
    """Write a surface in a format of others."""
    from distsurf.surface.formats import SUFFIXES, export

    surface = load(options.file, options.repeat)
    which = "" if options.repeat is None else f"_{options.repeat}"
    path = options.output or options.file.with_name(options.file.stem + which + SUFFIXES[options.to])
    if path.exists() and path.samefile(options.file):
        raise InputError(f"{path} is the surface itself; give another name with -o")
    if options.output is not None and path.exists():
        raise InputError(f"{path} exists; remove it, or give another name with -o")
    export(surface, path, options.to, options.height)
    print(path)
    return 0
