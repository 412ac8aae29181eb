"""A small, complete subject-driven world for a CPU: see docs/toybox.md."""
