"""``python -m examples.demo``: train a live vLLM server at TP = 2 on this machine, and show that it worked."""
