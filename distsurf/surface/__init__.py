"""The surface: labelled values on a grid, in memory and in one HDF5 file. Knows nothing of torch or MPI."""

from distsurf.evaluator import Column
from distsurf.surface.file import SurfaceFile
from distsurf.surface.surface import DONE, Status, Surface

__all__ = ["DONE", "Column", "Status", "Surface", "SurfaceFile"]
