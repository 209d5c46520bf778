"""One rank's trainer: the step, the loop that executes commands, memory profiling, CUDA graphs, and the update gate.

``Trainer`` has no sockets and no options of Hydra; ``RankLoop`` takes commands from rank 0's link to the coordinator and
makes all ranks agree on how each one ended.
"""
