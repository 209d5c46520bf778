"""``python -m apollo_tp.inspect``: which part of which checkpoint tensor lies on which rank, and what cannot be trained."""
