"""The launcher with a slow update: $APOLLO_TP_TEST_SLOW names a file. While it exists, rank 0 waits for the number of
seconds in it between the pause of the server and the write, and creates FILE.paused when it begins to wait."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from apollo_tp.launch.__main__ import main
from apollo_tp.training.update_gate import UpdateGate

VARIABLE = "APOLLO_TP_TEST_SLOW"
_before_write = UpdateGate.before_write


def _slow(self: UpdateGate, patience: float = 1.0) -> None:
    _before_write(self, patience)
    order = Path(os.environ[VARIABLE])
    if order.exists() and os.environ["RANK"] == "0":
        order.with_suffix(".paused").touch()
        time.sleep(float(order.read_text()))


if __name__ == "__main__":  # not in the tests' own process, which imports a name from here
    UpdateGate.before_write = _slow  # type: ignore[method-assign]
    sys.exit(main(sys.argv[1:]))
