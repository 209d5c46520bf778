"""What each rank of a server holds: boxes of checkpoint tensors, manifests, and the mapping of served memory."""
