"""FramePack: the transformer, the context it sees, and the pipeline around it."""
