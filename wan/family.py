"""What Wan2.1 is called."""

FAMILY = "wan"
"""What results of this model family call themselves."""
