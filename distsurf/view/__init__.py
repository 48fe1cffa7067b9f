"""Pictures of a surface. Reads surfaces, knows nothing of torch or MPI, and never imports pyplot."""

from distsurf.view.contours import contour, slices
from distsurf.view.curves import curves
from distsurf.view.figures import plot
from distsurf.view.relief import surface3d

__all__ = ["contour", "curves", "plot", "slices", "surface3d"]
