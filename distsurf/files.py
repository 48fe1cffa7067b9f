"""Names of files: replacing one without ever leaving half of it, and finding a free one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distsurf.errors import InputError


@contextmanager
def replacing(path: Path, *, may_exist: bool = True) -> Iterator[Path]:
    """Yield a temporary name in the folder of ``path``; afterwards fsync it and rename it onto ``path``.

    Where the body raises, the temporary file is removed and ``path`` stays as it was. With ``may_exist = False`` a file
    that has come to be under the name stays, and InputError is raised.
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
        if may_exist:
            os.replace(temporary, path)
        else:
            _rename_to_new(temporary, path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _rename_to_new(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise InputError(f"{path} has just been made by another process; choose another --out") from None
    except OSError:  # a file system without hard links
        if path.exists():
            raise InputError(f"{path} has just been made by another process; choose another --out") from None
        os.replace(temporary, path)


def _sync_folder(folder: Path) -> None:
    """Have a new name survive the machine, where the file system can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def free_name(path: Path, label: str) -> Path:
    """The first free ``NAME.label-N.SUFFIX`` beside a file."""
    number = 1
    while (free := path.with_name(f"{path.stem}.{label}-{number}{path.suffix}")).exists():
        number += 1
    return free
