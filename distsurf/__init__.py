"""Loss surfaces of neural networks, evaluated in parallel.

``distsurf.evaluate(model, data, loss, x=…, y=…)`` gives a `Surface`; `Surface.load` reads one from a file.
Importing distsurf imports neither torch, MPI nor matplotlib: each is imported where it is used.
"""

from typing import TYPE_CHECKING, Any

from distsurf.errors import DamagedFile, DistsurfError, Incomplete, InputError

if TYPE_CHECKING:
    from distsurf.job import Job
    from distsurf.run import evaluate
    from distsurf.surface import Surface

__version__ = "0.1.0"
__all__ = ["DamagedFile", "DistsurfError", "Incomplete", "InputError", "Job", "Surface", "evaluate"]

_HOMES = {"Job": "distsurf.job", "Surface": "distsurf.surface", "evaluate": "distsurf.run"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'distsurf' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
