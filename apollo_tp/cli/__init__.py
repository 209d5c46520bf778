"""``apollo-tp``: the command-line client of the coordinator, over HTTP or over ZMQ with CURVE keys."""
