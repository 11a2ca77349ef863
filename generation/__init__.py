"""From a resolved request to files on disk: the pipeline's shape, the loop that drives it, and what it saves."""
