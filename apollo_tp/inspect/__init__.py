"""``python -m apollo_tp.inspect``: where each checkpoint tensor lies on each rank, and what cannot be trained."""
