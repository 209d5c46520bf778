"""One rank's trainer: the step, the command loop around it, memory planning, CUDA graphs, and the update gate."""
