"""Python runs this at its start where this folder is on PYTHONPATH: Triton's autotuned kernels take the first of their
configurations. A first start compiles each of them once then, instead of some ten times (minutes, for gated delta nets)."""

import importlib.util
from typing import Any

if importlib.util.find_spec("triton"):
    from triton.runtime.autotuner import Autotuner

    tuned = Autotuner.__init__

    def first_only(self: Any, fn: Any, arg_names: Any, configs: Any, *args: Any, **kwargs: Any) -> None:
        tuned(self, fn, arg_names, list(configs)[:1], *args, **kwargs)

    Autotuner.__init__ = first_only
