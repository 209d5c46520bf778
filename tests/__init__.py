"""One thread for everything that tests compute, here and in the processes that they start: before anything imports torch.

The models are so small that a second thread saves nothing, and where ranks, servers and the tests share the cores, its
barriers spin for whole time slices: steps took tens of times as long.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"
