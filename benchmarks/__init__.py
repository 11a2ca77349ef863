"""What takes how long, and how much memory: measured on the machine at hand, never in the tests."""
