"""Wan2.1: the transformer, what it is told, and the pipeline around it."""
