"""The built wheel: what is in it, and that it works away from the checkout."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from customized_grpo.config.recipes import list_recipes
from customized_grpo.toybox.weights import NAMES, QUALITY

AS_TESTED = {"torch", "diffusers", "transformers", "huggingface-hub", "httpx2", "safetensors"}
"""Tested in the versions of constraints.txt alone."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing left over from an earlier build gets in."""
    root, folder = Path(__file__).parents[1], tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, folder)
    shutil.copytree(root / "src", folder / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__", ".*"))
    arguments = ["--wheel", "--no-isolation", str(folder)]
    built = subprocess.run([sys.executable, "-m", "build", *arguments], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(folder.glob("dist/*.whl"))


def test_the_wheel_holds_everything_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    weights = {f"customized_grpo/toybox/weights/{name}.safetensors" for name in NAMES}
    others = {
        f"customized_grpo/{name}" for name in (f"toybox/weights/{QUALITY}", "report/template.html.j2", "py.typed")
    }
    recipes = {f"customized_grpo/recipes/{name}.yaml" for name in list_recipes()}
    assert weights | others | recipes <= set(names) and recipes
    tops = {name.split("/")[0] for name in names}
    assert tops == {"customized_grpo", next(top for top in tops if top.endswith(".dist-info"))}


def test_the_installed_wheel_finds_its_weights_and_recipes(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True)
    code = (
        "from customized_grpo.toybox.policy import ToyBoxPolicy; import customized_grpo;"
        "ToyBoxPolicy.load(); print(customized_grpo.__file__);"
        "from customized_grpo.config.recipes import list_recipes; print(*list_recipes())"
    )
    environment = os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    package, recipes = done.stdout.splitlines()
    assert Path(package).is_relative_to(target) and recipes.split() == list(list_recipes())


def test_the_oldest_versions_are_those_that_the_package_allows(repository: Path) -> None:
    lines = (repository / "oldest.txt").read_text().splitlines()
    oldest = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    allowed = dict(each.split(">=") for each in project["dependencies"])
    assert oldest.keys() == allowed.keys() - AS_TESTED
    for name, version in oldest.items():
        assert f"{version}.".startswith(f"{allowed[name]}."), name
