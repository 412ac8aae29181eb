"""Online RL for subject-driven image generation: GRPO with synergy-aware shaping and time-aware weighting.

    from customized_grpo import Config, evaluate, generate, train

    run = train(Config(iterations=50, output="runs/mine", data={"path": "data/toybox/train"}))
    figures = evaluate(run, "data/toybox/test")
    pictures = generate(run, "a ghost in the snow, on the left", "subject.png", count=4)

The names are loaded at their first use: importing this package loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from customized_grpo.api import evaluate, generate, train
    from customized_grpo.config.run import Config
    from customized_grpo.policies.policy import Policy
    from customized_grpo.rewards.reward import Reward, Scores

__version__ = "0.1.0"
__all__ = ["Config", "Policy", "Reward", "Scores", "__version__", "evaluate", "generate", "train"]

_MODULES = {
    "Config": "config.run",
    "Policy": "policies.policy",
    "Reward": "rewards.reward",
    "Scores": "rewards.reward",
    "evaluate": "api",
    "generate": "api",
    "train": "api",
}
"""The module of each public name."""


if not TYPE_CHECKING:  # a type checker that saw it would accept every name

    def __getattr__(name: str) -> Any:
        """Load a public name; Python calls this for names that the module does not have yet."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
