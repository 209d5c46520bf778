"""The Hugging Face model of a checkpoint over the memory that a vLLM rank serves from."""

from apollo_tp.model.bind import bind_model
from apollo_tp.model.bound import BoundModel, BoundParameter, LossSums, SequenceLogprobs

__all__ = ["BoundModel", "BoundParameter", "LossSums", "SequenceLogprobs", "bind_model"]
