"""`customized-grpo init`: from a folder of photographs to a run that fits one's GPU, and the command that starts it."""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from customized_grpo.config.recipes import find_recipe, list_recipes
from customized_grpo.config.run import Config, set_dotted
from customized_grpo.data.entries import Entry, EntryOrProblem
from customized_grpo.data.formats import is_picture
from customized_grpo.data.prepare import Options, write_entries
from customized_grpo.data.scenes import prompts
from customized_grpo.errors import UserError
from customized_grpo.io.files import check_folder, listed, write_whole, writing
from customized_grpo.training.dry_run import dry_run
from customized_grpo.training.fit import Fit, fits, fitted

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
    """What was written: samples by split, and the settings, which are those of `recipe` but for `changes`; and what an
    iteration takes."""

    samples: dict[str, int]
    recipe: str
    settings: Path
    changes: dict[str, Any]
    peak_gib: float


def make_first_run(asked: Asked, on_progress: OnProgress, on_try: Callable[[Fit], object]) -> Made:
    """Write the data folders and the settings of a run on the user's photographs.

    Raises `UserError`, with nothing written, where a picture cannot be used or no setting fits the GPU.
    """
    check_folder(asked.folder, "FOLDER")
    if asked.folder.exists() and any(asked.folder.iterdir()):
        raise UserError(f"FOLDER: {asked.folder} is not empty; name a new folder")
    subjects = _subjects(asked.pictures)
    recipe = _recipe(asked.generator, asked.gpu_memory)
    splits = {split: asked.folder / "data" / split for split in prompts(asked.called)}
    changes: dict[str, Any] = {"output": str(asked.folder / "run")}
    changes |= {f"data.{'path' if split == 'train' else split}": str(path) for split, path in splits.items()}
    if not asked.segment and not _masked(subjects):
        changes["rewards.identity.dino.reference"] = "whole"
    fit, peak = _fitting(recipe, changes, asked.gpu_memory, on_try)
    changes |= fit
    options, samples = Options(segment=asked.segment), {}
    for split, path in splits.items():
        entries = [each for prompt in prompts(asked.called)[split] for each in _entries(subjects, prompt)]

        def show(done: int, of: int, split: str = split) -> None:
            on_progress(f"preparing {split} data", done, of)

        outcome = write_entries("folders", asked.pictures, path, options, len(entries), _yielded(entries), show)
        samples[split] = outcome.samples
    settings = asked.folder / SETTINGS
    with writing(asked.folder):
        write_whole(settings, edited(find_recipe(recipe).read_text(encoding="utf-8"), changes))
    return Made(samples, recipe, settings, changes, peak)


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


def _subjects(pictures: Path) -> dict[str, list[tuple[Path, Path | None]]]:
    """Return the pictures of each subject with their masks: of each folder in `pictures`, or of `pictures` itself."""
    if not pictures.is_dir():
        raise UserError(f"--pictures: {pictures} is no folder")
    folders = [path for path in listed(pictures) if path.is_dir()] or [pictures]
    found = {}
    for folder in folders:
        files = [path for path in listed(folder) if is_picture(path)]
        masks = {path.stem.removesuffix("_mask"): path for path in files if path.stem.endswith("_mask")}
        photographs = [path for path in files if not path.stem.endswith("_mask")]
        if photographs:
            found[folder.name] = [(path, masks.get(path.stem)) for path in photographs]
    if not found:
        raise UserError(
            f"--pictures: {pictures} holds no pictures; expected photographs of one subject, or a folder of them for "
            "each"
        )
    return found


def _masked(subjects: dict[str, list[tuple[Path, Path | None]]]) -> bool:
    return all(mask is not None for pairs in subjects.values() for _, mask in pairs)


def _entries(subjects: dict[str, list[tuple[Path, Path | None]]], prompt: str) -> list[Entry]:
    """Return an entry of each picture with the prompt."""
    return [
        Entry(f"{subject}/{path.name}", prompt, (path,), (mask,) if mask else (), subject)
        for subject, pairs in subjects.items()
        for path, mask in pairs
    ]


def _yielded(entries: list[Entry]) -> Generator[EntryOrProblem]:
    yield from entries


def _recipe(generator: str, gpu_memory: float) -> str:
    """Return the recipe of a generator for a GPU."""
    small = f"{generator.removesuffix('-plus')}{SMALL}"
    if gpu_memory < SMALL_GIB and small in list_recipes():
        return small
    if generator not in list_recipes():
        raise UserError(f"--generator: there is no recipe of {generator} yet; see docs/models.md")
    return generator


def _fitting(
    recipe: str, changes: dict[str, Any], limit: float, on_try: Callable[[Fit], object]
) -> tuple[dict[str, Any], float]:
    """Return the changes that bring a run of `recipe` under `limit` GiB, none where it is, and the peak in GiB."""
    tree = yaml.safe_load(find_recipe(recipe).read_text(encoding="utf-8"))
    for name, value in changes.items():
        set_dotted(tree, name, value)
    config = Config.model_validate(tree)
    found = dry_run(config)
    on_try(Fit({}, found))
    if fits(found, limit):
        return {}, found.peak_bytes / 2**30
    fit = fitted(config, limit, dry_run, on_try)
    if fit is None:
        raise UserError(
            f"--gpu_memory: {limit:g} GiB are not enough for {recipe} with any setting that is tried; choose a smaller "
            "--generator (flux2-klein takes the least)"
        )
    return fit.changes, fit.estimate.peak_bytes / 2**30
