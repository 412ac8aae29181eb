"""Evaluation on fixed samples: metrics, and the base generator against the tuned one."""
