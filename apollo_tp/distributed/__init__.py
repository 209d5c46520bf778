"""Process groups of the trainer's ranks and the collectives over them."""
