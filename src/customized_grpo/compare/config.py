"""Settings of a comparison, and the training runs they stand for."""

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError, model_validator

from customized_grpo.config.advantages import AdvantagesConfig
from customized_grpo.config.messages import format_validation_error
from customized_grpo.config.presets import BASE, CALIBRATED, HINGE, PRESETS, preset_settings
from customized_grpo.config.rewards import objectives
from customized_grpo.config.run import Config, flatten
from customized_grpo.config.section import Section
from customized_grpo.errors import UserError

OF_THE_GRID = {
    "seed", "output", "advantages.normalize", "advantages.shape", "advantages.weights", "advantages.lookup",
    "advantages.table",
}  # fmt: skip
"""Fields of `train` that a grid sets itself, run by run."""


class CompareConfig(Section):
    """A grid of training runs: presets x seeds, once for each of `settings`."""

    output: Path = Path("runs/compare")
    """Folder of the grid, empty or absent; a grid already begun there goes on."""
    results: Path | None = None
    """Table of finished runs to go on from, on any machine: runs in it are not repeated, others are added as they end.
    The settings of its grid stand beside it, as .yaml."""
    title: str = "Customized-GRPO against its parts and its rivals"
    """Headline of the page."""
    presets: dict[str, int] = Field(default_factory=lambda: dict.fromkeys([BASE, *PRESETS], 3) | {HINGE: 0})
    """Seeds of each preset: 3 means seeds 0, 1, 2; 0 leaves it out."""
    settings: dict[str, dict[str, Any]] = Field(default_factory=lambda: dict[str, dict[str, Any]]({"": {}}))
    """Named variations of `train`, each crossed with all presets: {name: {optimizer: {learning_rate: 1e-4}}}."""
    intervals: bool = True
    """State 95 % intervals over seeds, which takes two seeds of every preset; false allows a single one."""
    hinge_thresholds: dict[str, float] = Field({})
    """Of preset 'hinge': rewards by name count only up to these, as {identity: 0.36}."""
    calibration_prompts: int = Field(48, ge=2)
    """Prompts on which the time weights of 'customized-calibrated' are measured."""
    jobs: int = Field(1, ge=1)
    """Runs at once, each a process with its share of the cores."""
    train: Config = Config()
    """What all runs share: the fields of `customized-grpo train`."""

    @model_validator(mode="after")
    def _checked(self) -> "CompareConfig":
        for name, seeds in self.presets.items():
            if name != BASE and name not in PRESETS:
                raise ValueError(f"presets: unknown preset '{name}'; choose among {', '.join([BASE, *PRESETS])}")
            if seeds < 0:
                raise ValueError(f"presets: '{name}' has {seeds} seeds; expected 1 or more, or 0 to leave it out")
            if self.intervals and seeds == 1:
                raise ValueError(
                    f"presets: '{name}' has 1 seed, and an interval over seeds takes at least 2; give it more, "
                    "or set intervals to false"
                )
        if not self.trained:
            raise ValueError(f"presets: nothing to train; add some of {', '.join(PRESETS)}")
        if HINGE in self.trained and not self.hinge_thresholds:
            raise ValueError("hinge_thresholds: preset 'hinge' needs them; give some, as {identity: 0.36}")
        if unknown := sorted({*self.hinge_thresholds} - {*objectives(self.train.rewards)}):
            known = ", ".join(objectives(self.train.rewards))
            raise ValueError(f"hinge_thresholds: no reward '{unknown[0]}' is an objective; choose among {known}")
        if self.results is not None and self.results.suffix != ".csv":
            raise ValueError(f"results: found '{self.results}', expected the name of a table, as docs/results/runs.csv")
        if not self.settings:
            raise ValueError('settings: empty; leave it out, or write {"": {}} for a single variation')
        shared = flatten(self.train.model_dump(mode="json"))
        usual = flatten(Config().model_dump(mode="json"))
        places = {"train": {name for name in OF_THE_GRID & {*usual} if shared.get(name) != usual[name]}}
        places |= {f"settings '{name}'": set(flatten(changes)) for name, changes in self.settings.items()}
        for place, names in places.items():
            if taken := sorted(names & OF_THE_GRID):
                raise ValueError(
                    f"{place}: {', '.join(taken)} would be overwritten: a grid chooses seeds and folders, and its "
                    "presets how advantages are made; leave it out"
                )
        return self

    @property
    def trained(self) -> dict[str, int]:
        """Seeds by preset, of those that are trained."""
        return {name: seeds for name, seeds in self.presets.items() if name != BASE and seeds}


def run_settings(
    config: CompareConfig, setting: str, preset: str | None, seed: int, table: dict[str, list[float]] | None = None
) -> dict[str, Any]:
    """Return the settings of one run (of none of the presets, if None), as the tree that `train --config` reads.

    `table` holds the calibrated time weights. Raises `UserError` where the parts do not make a valid configuration.
    """
    tree = _merged(config.train.model_dump(mode="json"), config.settings[setting])
    try:
        shared = Config.model_validate(tree)
        if shared.data.test is None:
            raise UserError("data.test: presets are compared on test data; name its folder in train.data.test")
        if preset is not None:
            tree = _merged(tree, preset_settings(PRESETS[preset], shared))
        if preset == HINGE:
            limits = {name: {"up_to": limit} for name, limit in config.hinge_thresholds.items()}
            tree = _merged(tree, {"rewards": limits})
        if preset == CALIBRATED:
            # Before the calibration is measured, any table of the right length stands for it.
            table = table or {name: [1.0] * shared.rollout.num_steps for name in objectives(shared.rewards)}
            tree = _merged(tree, {"advantages": {"table": table}})
        # Drop shared settings that a preset does not use, such as gamma without SARS, or TDW's without schedules.
        unread = AdvantagesConfig.unread(tree["advantages"])
        if preset is not None and PRESETS[preset].constant is not None:
            unread.append("tdw")
        advantages = {name: value for name, value in tree["advantages"].items() if name not in unread}
        return Config.model_validate(tree | {"seed": seed, "advantages": advantages}).model_dump(mode="json")
    except ValueError as error:  # pydantic's too
        where = f"settings '{setting}', preset '{preset}'" if setting else f"preset '{preset}'"
        reason = format_validation_error(error) if isinstance(error, ValidationError) else str(error)
        raise UserError(f"{where}: {reason}") from error


def _merged(tree: dict[str, Any], changes: Any) -> dict[str, Any]:
    merged = dict(tree)
    for name, value in changes.items():
        old = merged.get(name)
        merged[name] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
