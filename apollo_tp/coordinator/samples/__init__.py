"""Validates the samples of a request and turns them into token ids with loss weights."""
