"""The diffusers pipelines that can be tuned, one in each file."""
