"""From a request's samples to token ids and loss weights."""
