"""Composition root: options in, ranks joined, server mapped, model bound, coordinator started, loop run.

    torchrun --nproc-per-node 2 -m apollo_tp.launch [overrides]
    mpirun -n 2 python -m apollo_tp.launch [overrides]

Nothing imports this package.
"""
