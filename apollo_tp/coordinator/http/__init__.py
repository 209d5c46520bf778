"""The HTTP service: routes, access control, metrics, the page, and the tunnel from vLLM's port."""
