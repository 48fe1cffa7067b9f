"""How a surface file is laid out, once: a header of our own, then HDF5.

HDF5 lets a file begin with a block that it never looks at. The header lies there: one line with a checksum, then JSON
with the job and the place of every dataset. What distsurf reads, it reads by those places, so that no byte of a
stranger's or a damaged file is ever parsed by anything but `json`, and no size is believed before it was compared
with the file's own. A dataset holds the same header again, in case the first page is lost.

HDF5 (for xarray, h5py and other tools) is written when the file is made and never again: nothing in its structure
moves, and what distsurf records goes to its places with plain writes (`distsurf.surface.file`).
"""

from __future__ import annotations

import contextlib
import json
import mmap
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from distsurf.errors import DamagedFile, InputError
from distsurf.evaluator import Column
from distsurf.grid import AXIS_NAMES, REPEAT, Axis, Grid
from distsurf.surface.storage import Storage

FORMAT = "distsurf-surface-2"
COST = "cost"
MAX_FAILURES = 1000
REASON_BYTES = 400
WRITER_BYTES = 512
# HDF5 keeps attributes in the object header, which ends at 64 KiB.
MAX_TEXT_BYTES = 60_000
MAX_HEADER_BYTES = 1 << 20
MOST_SEARCHED = 1 << 30
"""Files up to this many bytes are searched for a second header before they are called no surface files."""
RESERVED_NAMES = frozenset({*AXIS_NAMES, REPEAT, "status", COST, "state", "failures"})
SECOND_HEADER = "state/header"
PER_POINT = ("state/checksum", "state/attempts")
STATUS_MEANING = "0 pending, 1 evaluated, 2 interpolated, 3 failed"
CHECKSUM_MEANING = (
    "CRC-32 of the point's index (int64), its columns (float64, in the order of the attribute 'columns'), its cost "
    "(float64) and its status (uint8), all little-endian"
)
_NAME = FORMAT.encode() + b" "
_LINE = f"{FORMAT} {{:08d}} {{:08x}}\n"
LINE_BYTES = len(_LINE.format(0, 0))


@dataclass(frozen=True)
class Place:
    """Where a dataset lies in the file, as one run of bytes."""

    offset: int
    dtype: np.dtype[Any]
    count: int

    @property
    def end(self) -> int:
        """Offset of the first byte behind it."""
        return self.offset + self.count * self.dtype.itemsize


@dataclass(frozen=True)
class Layout:
    """A surface file's header."""

    grid: Grid
    columns: tuple[Column, ...]
    job: str
    fingerprint: dict[str, str]
    facts: dict[str, Any]
    places: dict[str, Place]
    size: int
    """Bytes of the whole file."""
    structure: int
    """CRC-32 of every byte behind the header that is in no place."""
    header: bytes = field(repr=False, default=b"")

    def is_as_written(self, storage: Storage) -> bool:
        """Whether everything but the datasets that change is what it was when the file was made."""
        found = 0
        for start, stop in _gaps(_block_bytes(len(self.header)), self.places, self.size):
            found = zlib.crc32(storage.read(start, stop - start), found)
        second = storage.read(self.places[SECOND_HEADER].offset, len(self.header))
        return found == self.structure and second == self.header and storage.size() == self.size


def _datasets(
    grid: Grid, columns: Sequence[Column], header: int = 0
) -> dict[str, tuple[np.dtype[Any], int, Any]]:
    """Every dataset that is written after the file was made: its type, its length, and what it holds at first."""
    points, slots = grid.size, min(grid.size, MAX_FAILURES)
    numbers = {column.name: (np.dtype("<f8"), points, np.nan) for column in columns}
    return numbers | {
        COST: (np.dtype("<f8"), points, np.nan),
        "status": (np.dtype("u1"), points, 0),
        "state/checksum": (np.dtype("<u4"), points, 0),
        "state/attempts": (np.dtype("u1"), points, 0),
        "state/totals": (np.dtype("<i8"), 2, 0),
        "state/writer": (np.dtype(f"S{WRITER_BYTES}"), 1, b""),
        "failures/point": (np.dtype("<i8"), slots, -1),
        "failures/reason": (np.dtype(f"S{REASON_BYTES}"), slots, b""),
        "failures/checksum": (np.dtype("<u4"), slots, 0),
        SECOND_HEADER: (np.dtype("u1"), header, 0),
    }


# -- making -----------------------------------------------------------------------------------------------


def bytes_needed(grid: Grid, columns: Sequence[Column]) -> int:
    """Size of a file, short of its HDF5 structure and texts."""
    return sum(dtype.itemsize * count for dtype, count, _ in _datasets(grid, columns).values())


def _structure_bytes(grid: Grid) -> int:
    """What HDF5 needs besides, at most: measured 50 kB for six columns, and the axes."""
    return sum(axis.count * 8 for axis in grid.axes) + MAX_HEADER_BYTES + (4 << 20)


def lay_out(
    storage: Storage,
    grid: Grid,
    columns: Sequence[Column],
    job: str,
    fingerprint: Mapping[str, str],
    facts: Mapping[str, Any],
) -> Layout:
    """Write an empty surface file, every byte of it, so that it has its room on the disk from now on.

    Raises InputError for names and texts that a file cannot hold, OSError from the storage.
    """
    for name in (column.name for column in columns):
        if name in RESERVED_NAMES or "/" in name or not name:
            taken = ", ".join(sorted(RESERVED_NAMES))
            raise InputError(
                f"a column cannot be called {name!r}: no '/', not empty, and none of {taken}; rename the split or value"
            )
    texts = {"job": job, "fingerprint": json.dumps(dict(fingerprint)), "facts": json.dumps(dict(facts))}
    for name, long in texts.items():
        if len(long.encode()) > MAX_TEXT_BYTES:
            raise InputError(
                f"the {name} text is {len(long.encode())} bytes long; a surface file holds {MAX_TEXT_BYTES}"
            )
    told = {
        "grid": [str(axis) for axis in grid.axes],
        "repeated": grid.repeated,
        "columns": [[column.name, column.unit] for column in columns],
        "job": job,
        "fingerprint": dict(fingerprint),
        "facts": dict(facts),
    }

    def header(offsets: Mapping[str, int], size: int, structure: int, length: int = 0) -> bytes:
        numbers = {"size": size, "structure": structure, "places": dict(offsets)}
        # Numbers first: the job is what a look at the file's first page should end with.
        body = json.dumps({**numbers, **told}, ensure_ascii=False).encode().ljust(length)
        return _LINE.format(len(body), zlib.crc32(body)).encode() + body

    # Its length has to be known before its numbers are: room for the longest.
    room = len(header(dict.fromkeys(_datasets(grid, columns), 10**15), 10**15, 1 << 32)) - LINE_BYTES
    block = _block_bytes(room + LINE_BYTES)
    datasets = _datasets(grid, columns, room + LINE_BYTES)
    image, offsets, size = _hdf5(grid, columns, datasets, texts, block)
    places = {name: Place(offsets[name], dtype, count) for name, (dtype, count, _) in datasets.items()}
    structure = 0
    for start, stop in _gaps(block, places, size):
        structure = zlib.crc32(image[start:stop], structure)
        storage.write(start, image[start:stop])
    for name, (dtype, count, first) in datasets.items():
        _fill(storage, places[name].offset, dtype, count, first)
    text = header(offsets, size, structure, room)
    storage.write(places[SECOND_HEADER].offset, text)
    storage.write(0, text.ljust(block, b"\0"))
    return _parsed(text)  # as every reader will see it


def _block_bytes(header: int) -> int:
    """What HDF5 leaves to us at the beginning: a power of two."""
    return max(512, 1 << (header - 1).bit_length())


def _gaps(start: int, places: Mapping[str, Place], end: int) -> Iterator[tuple[int, int]]:
    for place in sorted(places.values(), key=lambda place: place.offset):
        if place.offset > start:
            yield start, place.offset
        start = place.end
    if start < end:
        yield start, end


def _hdf5(
    grid: Grid,
    columns: Sequence[Column],
    datasets: Mapping[str, tuple[np.dtype[Any], int, Any]],
    texts: Mapping[str, str],
    block: int,
) -> tuple[mmap.mmap, dict[str, int], int]:
    """The HDF5 part in memory, without what its datasets hold: (bytes, offset of each dataset, end)."""
    import h5py

    image = _Image(block + bytes_needed(grid, columns) + _structure_bytes(grid))
    with h5py.File(image, "w", userblock_size=block) as handle:
        for name, axis in zip(grid.names, grid.axes, strict=True):
            handle.create_dataset(name, data=axis.values)
            handle[name].make_scale(name)
        units = {column.name: column.unit for column in columns} | {COST: "s", "status": ""}
        for group in ("state", "failures"):
            handle.create_group(group)
        offsets = {}
        for name, (dtype, count, first) in datasets.items():
            how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            how.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            how.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            if dtype.kind != "S":
                how.set_fill_value(np.array(first, dtype))
            shape = grid.shape if name in units or name in PER_POINT else (count,)
            space = h5py.h5s.create_simple(shape)
            kind = h5py.h5t.py_create(dtype, logical=True)
            dataset = h5py.Dataset(h5py.h5d.create(handle.id, name.encode(), kind, space, how))
            offsets[name] = dataset.id.get_offset()
            if name in units:
                dataset.attrs["units"] = units[name]
                for dimension, axis_name in enumerate(reversed(grid.names)):
                    dataset.dims[dimension].label = axis_name
                    dataset.dims[dimension].attach_scale(handle[axis_name])
        handle["status"].attrs["meaning"] = STATUS_MEANING
        handle["state/checksum"].attrs["meaning"] = CHECKSUM_MEANING
        for name, attribute in texts.items():
            handle.attrs[name] = attribute
        handle.attrs["columns"] = json.dumps([column.name for column in columns])
        handle.attrs["grid"] = json.dumps([str(axis) for axis in grid.axes])
        handle.attrs["format"] = FORMAT
        handle.flush()
        end = handle.id.get_filesize()
    return image.bytes, offsets, end


def _fill(storage: Storage, offset: int, dtype: np.dtype[Any], count: int, value: Any) -> None:
    most = 1 << 17
    block = np.full(min(count, most), value, dtype)
    for start in range(0, count, most):
        storage.write(offset + start * dtype.itemsize, block[: count - start].data)


class _Image:
    """A file in memory for h5py to write to. Pages that it leaves alone take no memory."""

    def __init__(self, size: int):
        self.bytes = mmap.mmap(-1, size)
        self._position = self._end = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to an offset from the start, the position or the end."""
        self._position = offset + (0, self._position, self._end)[whence]
        return self._position

    def tell(self) -> int:
        """The position."""
        return self._position

    def read(self, size: int) -> bytes:
        """Bytes from the position on."""
        return self.bytes[self._position : self._position + size]

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer from the position on."""
        view = memoryview(buffer).cast("B")
        view[:] = self.bytes[self._position : self._position + len(view)]
        return len(view)

    def write(self, data: Any) -> int:
        """Write at the position."""
        view = memoryview(data).cast("B")
        self.bytes[self._position : self._position + len(view)] = view
        self._end = max(self._end, self._position + len(view))
        return len(view)

    def truncate(self, size: int) -> int:
        """Set the end."""
        self._end = size
        return size

    def flush(self) -> None:
        """Nothing to do."""


# -- reading ----------------------------------------------------------------------------------------------


def read_layout(storage: Storage, *, any_size: bool = False) -> Layout | None:
    """A file's header; None where the file is none of ours.

    Raises DamagedFile where the header is there but not as it was written, or the file has another size than it says.
    """
    size = storage.size()
    first = storage.read(0, min(LINE_BYTES, size))
    body = _body(storage, first, LINE_BYTES)
    if body is None:
        if first.startswith(_NAME) or (size <= MOST_SEARCHED and read_second_layout(storage) is not None):
            raise DamagedFile("its header is damaged")
        return None
    layout = _parsed(first + body)
    if size < layout.size and not any_size:
        raise DamagedFile(f"it should be {layout.size:,} bytes long and is {size:,}")
    return layout


def read_second_layout(storage: Storage) -> Layout | None:
    """Any whole header that a file holds, wherever it lies; None if there is none. Reads all of the file."""
    size, step = storage.size(), 1 << 24
    for start in range(0, size, step):
        block = storage.read(start, min(step + LINE_BYTES, size - start))
        found = block.find(_NAME)
        while found >= 0:
            line = block[found : found + LINE_BYTES]
            body = _body(storage, line, start + found + LINE_BYTES)
            if body is not None:
                with contextlib.suppress(DamagedFile):
                    return _parsed(line + body)
            found = block.find(_NAME, found + 1)
    return None


def _length(line: bytes) -> int | None:
    parts = line.split()
    if len(line) != LINE_BYTES or not line.startswith(_NAME) or len(parts) != 3 or not parts[1].isdigit():
        return None
    return int(parts[1])


def _body(storage: Storage, line: bytes, offset: int) -> bytes | None:
    """What a header's line vouches for, at an offset; None if it does not."""
    length = _length(line)
    if length is None or offset + length > storage.size() or length > MAX_HEADER_BYTES:
        return None
    body = storage.read(offset, length)
    return body if line == _LINE.format(length, zlib.crc32(body)).encode() else None


def _parsed(header: bytes) -> Layout:
    """A header whose checksum is right: it may still have been written by a stranger, and hold anything."""
    try:
        told = json.loads(header[LINE_BYTES:])
        grid = Grid(tuple(map(Axis.parse, told["grid"])), bool(told.get("repeated")))
        columns = tuple(Column(str(name), str(unit)) for name, unit in told["columns"])
        texts = {str(name): str(text) for name, text in told["fingerprint"].items()}
        size, structure = int(told["size"]), int(told["structure"])
        places = {
            name: Place(int(told["places"][name]), dtype, count)
            for name, (dtype, count, _) in _datasets(grid, columns, len(header)).items()
        }
        reached = _block_bytes(len(header))
        for place in sorted(places.values(), key=lambda place: place.offset):
            if not reached <= place.offset or place.end > size:
                raise ValueError("its datasets lie outside of it or in each other")
            reached = place.end
        if size > _block_bytes(len(header)) + bytes_needed(grid, columns) + _structure_bytes(grid):
            raise ValueError("it says that it is larger than it can be")
        if not isinstance(told["facts"], dict):
            raise ValueError("its facts are no table")
        return Layout(grid, columns, str(told["job"]), texts, told["facts"], places, size, structure, header)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        OverflowError,
        InputError,
    ) as error:
        raise DamagedFile(f"its header cannot be understood: {' '.join(str(error).split())}") from error
