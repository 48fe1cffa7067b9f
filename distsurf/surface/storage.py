"""The bytes of a surface file, on a disk or in memory."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from distsurf.errors import DamagedFile


class Storage(Protocol):
    """Bytes with places. Everything may raise OSError."""

    def size(self) -> int:
        """How many bytes there are."""

    def read(self, offset: int, size: int) -> bytes:
        """``size`` bytes from an offset on. Raises DamagedFile where there are fewer."""

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put bytes at an offset."""

    def sync(self) -> None:
        """Have everything written so far survive the machine."""

    def close(self) -> None:
        """Let go of it."""


class Memory:
    """A surface without a file."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def size(self) -> int:
        return len(self._bytes)

    def read(self, offset: int, size: int) -> bytes:
        return bytes(self._bytes[offset : offset + size])

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        if offset + len(view) > len(self._bytes):
            self._bytes.extend(bytes(offset + len(view) - len(self._bytes)))
        self._bytes[offset : offset + len(view)] = view

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass


class Padded:
    """What is left of a file that was cut off, to be read as if zeros followed."""

    def __init__(self, storage: Storage, size: int):
        self._storage, self._size = storage, size

    def size(self) -> int:
        return max(self._size, self._storage.size())

    def read(self, offset: int, size: int) -> bytes:
        there = max(0, min(size, self._storage.size() - offset))
        return (self._storage.read(offset, there) if there else b"").ljust(size, b"\0")

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        raise OSError(errno.EROFS, "a damaged file stays as it is")

    def sync(self) -> None:
        pass

    def close(self) -> None:
        self._storage.close()


class Disk:
    """A file that stays open. Locks are no matter of it: `distsurf.surface.claim`."""

    def __init__(self, path: Path, *, write: bool):
        self.path = path.absolute()  # a model may change the folder
        self._descriptor = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)

    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        parts = []
        while size and (part := os.pread(self._descriptor, min(size, 1 << 30), offset)):
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
        if size:
            raise DamagedFile(f"it ends {size:,} bytes too early")
        return b"".join(parts)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        while view:
            written = os.pwrite(self._descriptor, view, offset)
            offset, view = offset + written, view[written:]

    def sync(self) -> None:
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not every file system can
                raise

    def require_in_place(self) -> None:
        """Raise OSError unless our file still has its name: FileNotFoundError, or ESTALE where another one took it."""
        mine, there = os.fstat(self._descriptor), os.stat(self.path)
        if not os.path.samestat(mine, there):
            raise OSError(errno.ESTALE, "another file has taken its place")

    def close(self) -> None:
        os.close(self._descriptor)


class CutOff(OSError):
    """Somebody has shortened a file that is being written."""


class Mirrored:
    """A file that is being written, with all its bytes in memory: what others do to it loses nothing."""

    def __init__(self, disk: Disk):
        self._disk = disk
        self._bytes = bytearray(disk.read(0, disk.size()))

    def size(self) -> int:
        return len(self._bytes)

    def read(self, offset: int, size: int) -> bytes:
        if offset + size > len(self._bytes):
            raise DamagedFile(f"it ends {offset + size - len(self._bytes):,} bytes too early")
        return bytes(self._bytes[offset : offset + size])

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data).cast("B")
        self._disk.write(offset, view)
        self._bytes[offset : offset + len(view)] = view

    def sync(self) -> None:
        self._disk.sync()

    def require_in_place(self) -> None:
        """As `Disk.require_in_place`; raises CutOff where the file has become shorter."""
        self._disk.require_in_place()
        if self._disk.size() < len(self._bytes):
            raise CutOff(errno.EIO, "it has been cut off")

    def differs(self, parts: Iterable[tuple[int, int]]) -> bool:
        """Whether the file has other bytes than were written, in parts from an offset to another."""
        if self._disk.size() < len(self._bytes):
            return True
        return any(self._disk.read(start, stop - start) != self._bytes[start:stop] for start, stop in parts)

    def restore(self, parts: Iterable[tuple[int, int]]) -> None:
        """Write these parts again, and all of the file where it was cut off."""
        if self._disk.size() < len(self._bytes):
            parts = [(0, len(self._bytes))]
        for start, stop in parts:
            self._disk.write(start, memoryview(self._bytes)[start:stop])
        self._disk.sync()

    def close(self) -> None:
        self._disk.close()
