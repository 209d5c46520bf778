"""What each rank of a server holds, and how it is mapped.

A manifest is published by each vLLM worker: its allocations, served tensors, and segments (boxes of checkpoint tensors and
the strided views that hold them). ``placement`` turns the manifests of all ranks into shards, ``mapping`` into views of the
served memory. Only ``mapping`` needs torch.
"""
