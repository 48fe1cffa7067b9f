"""What can be trusted of a damaged surface file, in a new one."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np

from distsurf.errors import DamagedFile, InputError
from distsurf.files import free_name
from distsurf.surface.file import SurfaceFile, in_words, opened
from distsurf.surface.layout import Layout, read_layout, read_second_layout
from distsurf.surface.records import Problem, Records
from distsurf.surface.storage import Padded, Storage
from distsurf.surface.surface import Status, Surface

LEAST_LEFT = 1000
"""A file cut to less than this fraction is not worth the memory that its header asks for."""


def repair(path: Path, out: Path | None = None) -> tuple[Path, str, Surface]:
    """Write what can be trusted of a damaged file to a new one: its name, what was wrong, and what it holds.

    Points whose record is whole are kept, also those whose status was lost; all others are pending. The damaged file
    stays as it is. Raises InputError where nothing is wrong, DamagedFile where both headers are gone.
    """
    with contextlib.closing(opened(path, write=False)) as storage:
        layout, problems = _any_layout(storage)
        if layout is None:
            raise DamagedFile(f"{path} cannot be repaired: no whole header of a surface file is left in it")
        if storage.size() * LEAST_LEFT < layout.size:
            raise DamagedFile(
                f"{path} cannot be repaired: of {layout.size:,} bytes only {storage.size():,} are left"
            )
        records = Records(Padded(storage, layout.size), layout)
        problems += records.problems()
        if not problems:
            raise InputError(f"{path} is sound: there is nothing to repair")
        surface = records.surface(_trusted(records), path)
    new = out or free_name(path, "repaired")
    if new.exists():
        raise InputError(f"{new} exists already; choose another name for the repaired file")
    SurfaceFile.write(new, surface)
    return new, in_words(problems, surface.grid), surface


def _any_layout(storage: Storage) -> tuple[Layout | None, list[Problem]]:
    try:
        layout = read_layout(storage)
        return layout or read_second_layout(storage), []
    except DamagedFile as error:
        problem = Problem(str(error), np.empty(0, np.int64))
    with contextlib.suppress(DamagedFile):
        return read_layout(storage, any_size=True) or read_second_layout(storage), [problem]
    with contextlib.suppress(DamagedFile):
        return read_second_layout(storage), [problem]
    return None, [problem]


def _trusted(records: Records) -> np.ndarray:
    """Statuses that the records themselves vouch for."""
    told = records.array("status")
    trusted = np.zeros(len(told), np.uint8)
    for kind in (Status.INTERPOLATED, Status.EVALUATED):
        trusted[records.vouched(np.full(len(told), kind, np.uint8))] = kind
    failed = (told == Status.FAILED) & (trusted == Status.PENDING)
    trusted[failed & records.vouched(told)] = Status.FAILED
    return trusted
