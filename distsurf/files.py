"""Replacing a file without ever leaving half of one under its name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distsurf.errors import InputError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary name in the folder of ``path``; afterwards fsync it and rename it onto ``path``.

    Where the body raises, the temporary file is removed and ``path`` stays as it was.
    Raises InputError if the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The suffix stays last: some writers choose their format by it.
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    except OSError as error:
        raise InputError(
            f"cannot write to the folder {path.parent}: {error.strerror}; choose another output"
        ) from error
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp's 0600 would lock the user's group out
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
