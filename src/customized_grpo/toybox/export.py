"""Writes ToyBox data as the folder any user's data is: PNG references, masks and metadata.jsonl."""

from pathlib import Path

from customized_grpo.data import Sample, save_image, write_metadata
from customized_grpo.errors import UserError
from customized_grpo.randomness import generator
from customized_grpo.toybox.pairs import draw_pairs
from customized_grpo.toybox.world import PATTERNS, SHAPES, Split


def export(folder: Path, split: Split, count: int, seed: int = 0) -> Path:
    """Write `count` prompts, each with its reference and mask, with identities of `split`; returns the manifest's
    path.

    The same split, count and seed give the same folder. Raises `UserError` when `folder` is not empty, or `count`
    below 1.
    """
    if count < 1:
        raise UserError(f"--count: {count} prompts cannot be written; give 1 or more")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder")
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; name a new folder, or delete it first")
    pairs = draw_pairs(count, split, generator(seed, "export", split))
    samples = []
    for row in range(count):
        name = f"{split}-{row:05d}"
        reference, mask = Path("references", f"{name}.png"), Path("masks", f"{name}.png")
        save_image(pairs.references[row], folder / reference)
        save_image(pairs.masks[row], folder / mask)
        subject = f"{PATTERNS[pairs.subjects.pattern[row]]} {SHAPES[pairs.subjects.shape[row]]}"
        samples.append(Sample(name, pairs.captions[row], (reference,), (mask,), subject))
    return write_metadata(folder, samples)
