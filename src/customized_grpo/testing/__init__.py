"""Tiny random models of the true classes, for tests and benchmarks."""
