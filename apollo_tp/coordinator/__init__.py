"""The coordinator: a separate process next to trainer rank 0, without torch. Durable jobs, HTTP, metrics.

__main__      starts and connects all parts of the process
settings      what apollo_tp.launch passes to this process, as a JSON file and as orders
waiting       the port and the page while the server is not ready
json_logging  the log
jobs          jobs and their states, the SQLite store, the scheduler, the link to rank 0, TensorBoard and Weights & Biases
samples       request bodies and lines of files, and how they become token ids with loss weights
http          the FastAPI application: routes of both APIs, access, errors, and requests forwarded from vLLM's port
"""
