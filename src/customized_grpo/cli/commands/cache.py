"""`customized-grpo cache`: show or clear the encoded prompts and references."""

from pathlib import Path

from jsonargparse import Namespace

from customized_grpo.cli.command import Command
from customized_grpo.cli.parser import Parser
from customized_grpo.config.policy import PolicyConfig
from customized_grpo.errors import UserError


def build_parser() -> Parser:
    """Return the parser of `cache`."""
    cache = Parser(
        description="Show the size of the folder of encoded prompts and references (policy.pipeline.cache), or "
        "empty it. Nothing is removed while a run uses the folder."
    )
    cache.add_argument(
        "--folder", type=Path, default=PolicyConfig().pipeline.cache, help="the folder; %(default)s if left out"
    )
    cache.add_argument("--clear", action="store_true", help="remove all that is encoded; runs encode it again")
    return cache


def run(options: Namespace) -> None:
    """Print the number of cached files and their size, or remove them."""
    from customized_grpo.policies import cache_folder

    folder = options.folder
    if not folder.is_dir():
        raise UserError(f"--folder: there is no folder {folder}; name the policy.pipeline.cache of your runs")
    if options.clear:
        count, size = cache_folder.clear(folder)
        print(f"{folder}: {count} files removed, {cache_folder.gigabytes(size)}")
    else:
        files = cache_folder.list_files(folder)
        print(f"{folder}: {len(files)} files, {cache_folder.gigabytes(sum(each.bytes for each in files))}")


CACHE = Command(
    "cache", "size of the encoded prompts and references, and how to clear them", build_parser, run
)  # fmt: skip
