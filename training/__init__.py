"""From training batches to a LoRA file: the step, the loop around it, and everything that makes both repeatable."""
