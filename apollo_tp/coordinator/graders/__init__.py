"""OpenAI's graders: what a sampled completion is worth, as a number.

``schema`` checks what a client sent, ``grading`` runs it.
"""
