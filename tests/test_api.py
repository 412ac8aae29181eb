"""The public names, and a run on ToyBox from Python."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest

import customized_grpo
from customized_grpo import Config, evaluate, generate, train
from customized_grpo.errors import UserError
from customized_grpo.tracking.console import Display

PROMPT = "a star on the beach"


def test_the_package_loads_nothing_until_a_name_is_used() -> None:
    code = (
        "import sys, customized_grpo\n"
        "heavy = {'torch', 'numpy', 'PIL', 'pydantic', 'jsonargparse', 'rich', 'diffusers', 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "customized_grpo.Config\n"
        "print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["[]", "[]"]


def test_all_public_names_are_there_and_documented() -> None:
    assert set(customized_grpo.__all__) <= set(dir(customized_grpo))
    for name in set(customized_grpo.__all__) - {"__version__"}:
        assert getattr(customized_grpo, name).__doc__, name
    with pytest.raises(AttributeError, match="module 'customized_grpo' has no attribute 'trane'"):
        customized_grpo.trane  # noqa: B018


def test_no_module_takes_the_place_of_a_public_name() -> None:
    for module in ("api", "generation", "training.run", "evaluation.evaluator"):
        importlib.import_module(f"customized_grpo.{module}")
    for name in ("train", "evaluate", "generate"):
        assert isinstance(getattr(customized_grpo, name), FunctionType)


def test_from_a_configuration_to_pictures(
    make_config: Callable[..., Config], toybox_data: Path, display: Display
) -> None:
    run = train(make_config({"ema.decay": 0.9, "checkpoint.every": 1}), display=display)
    assert (run / "report.html").is_file() and "iteration 2/2" in display.console.file.getvalue()
    figures = evaluate(run, str(toybox_data / "test"), num_samples=2, display=display)
    assert list(figures) == ["base", "tuned"]
    assert {"mean", "low", "high"} <= set(figures["tuned"]["joint_success"])
    reference = toybox_data / "train" / "references" / "train-00000.png"
    pictures = generate(run, PROMPT, reference, count=2)
    assert len(pictures) == 2 and {picture.mode for picture in pictures} == {"RGB"}
    again = generate(str(run), PROMPT, [str(reference)], count=2)
    assert [picture.tobytes() for picture in pictures] == [picture.tobytes() for picture in again]
    for options in ({"seed": 1}, {"base": True}, {"ema": True}, {"checkpoint": run / "checkpoints" / "000001"}):
        assert generate(run, PROMPT, reference, **options)[0].tobytes() != pictures[0].tobytes(), options


def test_a_run_goes_on_or_is_deleted_only_if_asked(make_config: Callable[..., Config], display: Display) -> None:
    run = train(make_config({"iterations": 1}), display=display)
    with pytest.raises(UserError, match="is not empty"):
        train(make_config({"iterations": 1}), display=display)
    longer = make_config({"iterations": 2})
    assert train(longer, resume=True, display=display) == run
    checkpoint = str(run / "checkpoints" / "000001")
    train(longer, resume_from=checkpoint, display=display)
    train(longer, overwrite=True, display=display)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


def test_the_documented_examples_are_of_this_version(repository: Path) -> None:
    """Their imports and their configurations; what they compute is tested above."""
    page = (repository / "docs" / "api.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    outputs = []
    for block in blocks:
        tree = ast.parse(block)
        tree.body = [
            node
            for node in tree.body
            if isinstance(node, ast.Import | ast.ImportFrom)
            or (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("config", "settings"))
        ]
        names: dict[str, Any] = {}
        exec(compile(tree, "docs/api.md", "exec"), names)
        outputs.append(names["config"].output)
    assert outputs == [Path("runs/mine")] * 2


def test_bad_input_is_an_error_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not the folder of a run"):
        generate("nowhere", PROMPT, "a.png")
    with pytest.raises(UserError, match="give 1 or more"):
        evaluate(tmp_path, num_samples=0)
