"""What a user can write, parsed once into frozen dataclasses (standard library only)."""
