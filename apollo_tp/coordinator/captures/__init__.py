"""Stored completions of the server, feedback on them, and what is learned from it."""
