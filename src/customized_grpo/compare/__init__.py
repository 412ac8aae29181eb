"""Compares presets of the same pipeline over seeds: the grid of runs, its numbers, figures and page."""
