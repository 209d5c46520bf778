"""The Hugging Face model of a checkpoint, over the memory that a vLLM rank serves from.

``bind_model`` builds the model without memory of its own at this rank's width, replaces every parameter by a view of the
served memory, and inserts collectives where the shards say so. No architecture has code of its own: what cannot be read off
config and shards is one table (``families``).
"""

from apollo_tp.model.bind import bind_model
from apollo_tp.model.bound import BoundModel, BoundParameter, LossSums, SequenceLogprobs

__all__ = ["BoundModel", "BoundParameter", "LossSums", "SequenceLogprobs", "bind_model"]
