"""Jobs: their records in SQLite, the scheduler that runs them, checkpoints, evaluation, and the link to rank 0."""
