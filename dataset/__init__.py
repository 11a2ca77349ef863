"""From what a user's data set holds to cached tensors, and from there to training batches."""
