"""Training: an iteration, the loop around it, checkpoints, and the folder of a run."""
