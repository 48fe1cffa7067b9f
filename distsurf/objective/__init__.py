"""What is measured at a grid point: data in memory, losses and metrics, and the evaluator that sums them up.

Knows nothing of MPI or HDF5. Import from the modules: `data`, `losses`, `evaluator`.
"""
