"""Composition root of a trainer rank: options, joining of ranks, mapping, binding, the coordinator, the command loop.

    torchrun --nproc-per-node 2 -m apollo_tp.launch [overrides]
    mpirun -n 2 python -m apollo_tp.launch [overrides]

Nothing imports this package.
"""
