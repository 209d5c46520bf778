"""``python -m examples.demo``: train a live vLLM server at TP = 2 on this machine, and show that it worked.

Also the place of what the demo and the end-to-end tests share: a small model, and processes that start and stop in order.
"""
