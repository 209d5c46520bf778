"""``python -m tests.support.run_code CODE``: as ``python -c`` does, for launchers that start modules."""

import sys

if __name__ == "__main__":
    exec(sys.argv[1])
