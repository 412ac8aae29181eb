"""What a user sees of a run: progress on the terminal, and timings."""
