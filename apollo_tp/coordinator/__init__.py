"""The coordinator: a process of its own beside trainer rank 0, without torch. Durable jobs, HTTP, metrics.

settings    what launch.py tells this process, as a JSON file
jobs        the record of a job, its states, and which samples its step k trains on
store       jobs, events, files and checkpoints in SQLite; samples: one file per job
render      text -> token ids with loss weights (chat template, truncation)
schema      request bodies, and how a schema error becomes a 4xx body
intake      a checked body -> samples
ranks       the ZMQ link to rank 0: commands out, replies and heartbeats in
scheduler   the one writer of job progress: which command is sent next (progress: how fast; evaluation: forward only)
service     what all routes share; train_api, openai_files, openai_jobs, page, metrics, openapi: the routes
http, edge  one table of routes; around it access (auth), body limits, errors -> status in one table
tunnel      the same routes for requests that arrive on vLLM's own port
writers     TensorBoard and Weights & Biases
"""
