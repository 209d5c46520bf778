"""Process groups of the trainer's ranks and the collectives over them.

The control group (gloo) carries commands and their outcomes; the tensor-parallel compute group (NCCL, or gloo on a CPU)
carries tensors. With two GPUs, sums may go through peer memory instead of NCCL.
"""
