"""The coordinator: a process of its own beside trainer rank 0, without torch. Durable jobs, HTTP, metrics.

settings   what launch.py tells this process, as a JSON file
jobs       the record of a job, its states, and which samples its step k trains on
store      jobs, events, files and checkpoints in SQLite; samples in one file per job
render     text -> token ids with loss weights (chat template, truncation)
schema     request bodies, and how a schema error becomes a 4xx body
intake     a checked request -> a stored job
ranks      the ZMQ link to rank 0: commands out, replies and heartbeats in
scheduler  the one writer of job progress: decides which command is sent next
http       the routes; errors -> status in one table
openai_*   the OpenAI files and fine-tuning routes
tunnel     the same routes for requests that arrive on vLLM's own port
auth, metrics, writers
"""
