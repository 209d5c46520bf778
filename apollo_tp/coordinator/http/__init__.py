"""The coordinator's HTTP service.

app           the FastAPI application, its OpenAPI document and /docs middleware    around all routes: access (auth),
body limits, the weight version, unforeseen errors parameters    query parameters and bodies; a route refuses what it
does not declare errors        exceptions -> status and JSON body service       what the routes share: find, list and
act on jobs train         the trainer's own API; openai_jobs and openai_files: the OpenAI API; job_routes: what both
have validation    the files of a fine-tuning job, before it is queued metrics, page Prometheus; the page at / views
jobs, status and events as JSON and server-sent events tunnel, curve requests that arrive over ZMQ: from vLLM's own
port, and with CURVE keys from other hosts
"""
