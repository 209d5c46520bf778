"""``apollo-tp``: the command-line client of the coordinator."""
