"""Online RL for subject-driven image generation: GRPO with synergy-aware shaping and time-aware weighting."""

__version__ = "0.1.0"
