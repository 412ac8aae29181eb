"""The generators: the protocol `Policy`, and diffusers pipelines with LoRA behind it."""
