"""Trainable additions to a frozen transformer: LoRA, LoHa, LoKr, their files, and their weight differences."""
