"""Differences between vLLM releases and devices."""
