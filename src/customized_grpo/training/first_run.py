"""`customized-grpo init`: from a folder of photographs to a run that fits one's GPU, and the command that starts it."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import yaml

from customized_grpo.config.recipes import find_recipe, list_recipes
from customized_grpo.config.run import Config
from customized_grpo.data.entries import Entry, EntryOrProblem, Problem
from customized_grpo.data.formats import is_picture, remedy
from customized_grpo.data.prepare import Options, write_entries
from customized_grpo.data.scenes import prompts
from customized_grpo.data.sources import read_subject
from customized_grpo.errors import UserError
from customized_grpo.io.files import check_folder, listed, write_whole, writing
from customized_grpo.training.dry_run import dry_run
from customized_grpo.training.fit import GIB, Fit, fits, fitted

SETTINGS = "settings.yaml"
SMALL = "-24gb"
"""Ends the name of a recipe for one small GPU."""
SMALL_GIB = 40.0
"""GPUs below it get such a recipe, if the generator has one."""
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Asked:
    """What a user says of a first run. `called`: the subject with its article, as prompts name it."""

    folder: Path
    pictures: Path
    called: str
    generator: str
    gpu_memory: float
    segment: bool = False


@dataclass(frozen=True)
class Made:
    """What was written: samples by split, and the settings, which began as those of `recipe`; what of the photographs
    was left out, and what an iteration takes."""

    samples: dict[str, int]
    left_out: list[Problem]
    recipe: str
    settings: Path
    peak_gib: float


def make_first_run(asked: Asked, on_progress: OnProgress, on_try: Callable[[Fit], object]) -> Made:
    """Write the data folders and the settings of a run on the user's photographs.

    Raises `UserError`, with nothing written, where a picture cannot be used or no setting fits the GPU.
    """
    check_folder(asked.folder, "FOLDER")
    if asked.folder.exists() and any(asked.folder.iterdir()):
        raise UserError(f"FOLDER: {asked.folder} is not empty; name a new folder")
    photographs, problems = _photographs(asked.pictures)
    recipe = _recipe(asked.generator, asked.gpu_memory)
    splits = {split: asked.folder / "data" / split for split in prompts(asked.called)}
    changes: dict[str, Any] = {"output": str(asked.folder / "run")}
    changes |= {f"data.{'path' if split == 'train' else split}": str(path) for split, path in splits.items()}
    if not asked.segment and not all(each.masks for each in photographs):
        changes["rewards.identity.dino.reference"] = "whole"
    text = edited(find_recipe(recipe).read_text(encoding="utf-8"), changes)
    fit = _fitting(recipe, Config.model_validate(yaml.safe_load(text)), asked.gpu_memory, on_try)
    options, samples = Options(segment=asked.segment), {}
    left_out: list[Problem] = []
    for split, path in splits.items():
        entries: list[EntryOrProblem] = [
            replace(each, prompt=prompt) for prompt in prompts(asked.called)[split] for each in photographs
        ]
        if split == "train":  # told once
            entries = [*problems, *entries]

        def show(done: int, of: int, split: str = split) -> None:
            on_progress(f"preparing {split} data", done, of)

        reading = (each for each in entries)
        outcome = write_entries("folders", asked.pictures, path, options, len(entries), reading, show)
        samples[split] = outcome.samples
        left_out += outcome.problems
    settings = asked.folder / SETTINGS
    with writing(asked.folder):
        write_whole(settings, edited(text, fit.changes))
    return Made(samples, left_out, recipe, settings, fit.estimate.peak_bytes / GIB)


def edited(text: str, changes: Mapping[str, Any]) -> str:
    """Return a configuration file's `text` with other values, by dotted name; its other lines and comments stay."""
    lines = text.splitlines()
    for name, value in changes.items():
        *sections, key = name.split(".")
        start, end = 0, len(lines)
        for depth, section in enumerate(sections):
            place = _place(lines, start, end, f"{'  ' * depth}{section}:")
            if place is None:
                lines.insert(start, f"{'  ' * depth}{section}:")
                place, end = start, end + 1
            start = place + 1
            end = next((i for i in range(start, end) if _indent(lines[i]) <= 2 * depth), end)
        line = f"{'  ' * len(sections)}{key}: {_as_yaml(value)}"
        place = _place(lines, start, end, f"{'  ' * len(sections)}{key}:")
        if place is None:
            lines.insert(start, line)
        else:
            before = lines[place].partition(":")[2].partition(" #")[0].strip()
            lines[place] = f"{line} # in the recipe: {before}"
    return "\n".join(lines) + "\n"


def _place(lines: Sequence[str], start: int, end: int, words: str) -> int | None:
    return next((i for i in range(start, end) if lines[i].startswith(words)), None)


def _indent(line: str) -> float:
    """Return by how many spaces a line is moved in; of one without settings, more than any."""
    bare = line.strip()
    return math.inf if not bare or bare.startswith("#") else len(line) - len(line.lstrip())


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...").strip()


def _photographs(pictures: Path) -> tuple[list[Entry], list[Problem]]:
    """Return an entry without a prompt for each photograph, of each folder in `pictures` or of `pictures` itself; and
    what is wrong with the others."""
    if not pictures.is_dir():
        raise UserError(f"--pictures: {pictures} is no folder")
    folders = [path for path in listed(pictures) if path.is_dir()] or [pictures]
    found: list[Entry] = []
    problems: list[Problem] = []
    for folder in folders:
        if not any(is_picture(path) or remedy(path.suffix) for path in listed(folder)):
            continue
        for each in read_subject(pictures, folder, [""]):
            if isinstance(each, Problem):
                problems.append(each)
            else:
                found += _one_by_one(each)
    if not found and not problems:
        raise UserError(
            f"--pictures: {pictures} holds no pictures; expected photographs of one subject, or a folder of them for "
            "each"
        )
    return found, problems


def _one_by_one(entry: Entry) -> Iterator[Entry]:
    """Yield an entry for each reference of `entry`."""
    for path, mask in zip(entry.references, entry.masks or repeat(None), strict=False):
        place = f"{entry.subject}/{path.name}"
        yield replace(entry, place=place, references=(path,), masks=() if mask is None else (mask,))


def _recipe(generator: str, gpu_memory: float) -> str:
    """Return the recipe of a generator for a GPU."""
    small = f"{generator.removesuffix('-plus')}{SMALL}"
    if gpu_memory < SMALL_GIB and small in list_recipes():
        return small
    if generator not in list_recipes():
        raise UserError(f"--generator: there is no recipe of {generator} yet; see docs/models.md")
    return generator


def _fitting(recipe: str, config: Config, limit: float, on_try: Callable[[Fit], object]) -> Fit:
    """Return the changes that bring a run of `config` under `limit` GiB, none where it is."""
    fit = Fit({}, dry_run(config))
    on_try(fit)
    found = fit if fits(fit.estimate, limit) else fitted(config, limit, dry_run, on_try)
    if found is None:
        raise UserError(
            f"--gpu_memory: {limit:g} GiB are not enough for {recipe} with any setting that is tried; choose a smaller "
            "--generator (flux2-klein takes the least)"
        )
    return found
