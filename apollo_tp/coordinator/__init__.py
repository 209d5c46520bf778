"""The coordinator: a process of its own, started by trainer rank 0, without torch. It owns jobs, HTTP and the database.

http      routes, access control, metrics, the page, and the tunnel from vLLM's port
samples   from the samples of a request to token ids with loss weights
jobs      records in SQLite, the scheduler (the one writer of job progress), checkpoints, evaluation, the link to rank 0

A job is stored with fsync before it is acknowledged. What holds after a crash is in docs/explanation/crash-safety.md.
"""
