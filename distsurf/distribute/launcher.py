"""How a launcher started this process, as its environment tells: known before anything else is imported."""

from __future__ import annotations

import os
from collections.abc import Mapping

OPENMPI_RUN, MPICH_RUN, SRUN = "Open MPI's mpirun", "MPICH's mpirun", "srun"


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, int, str] | None:
    """How a launcher started this process: (rank, size, launcher), or None for a process on its own."""
    for launcher, rank, size in (
        (OPENMPI_RUN, "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        (MPICH_RUN, "PMI_RANK", "PMI_SIZE"),
        (SRUN, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ):
        if rank in environment and size in environment:
            if launcher == MPICH_RUN and "MPI_LOCALNRANKS" not in environment:
                launcher = SRUN  # its pmi2 sets PMI_RANK and PMI_SIZE too, but not this one
            return int(environment[rank]), int(environment[size]), launcher
    return None
