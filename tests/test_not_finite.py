"""A generator that draws pictures that are not finite ends every command with words, and costs a run nothing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from customized_grpo.benchmark.command import run_benchmark
from customized_grpo.benchmark.config import BenchmarkConfig
from customized_grpo.cli.main import main
from customized_grpo.config.run import Config
from customized_grpo.diagnosis.command import diagnose
from customized_grpo.errors import NotFinite
from customized_grpo.generation import Options, write_pictures
from customized_grpo.io.jsonl import Metrics
from customized_grpo.toybox.policy import ToyBoxPolicy
from customized_grpo.tracking.console import Display
from customized_grpo.training.checkpoint import list_checkpoints
from customized_grpo.training.run import evaluate_run
from customized_grpo.training.trainer import Trainer

SAID = r"pictures that the generator drew are not finite\. Likely causes: .*policy\.precision.*learning_rate.*adapter"
RunTraining = Callable[..., Path]


class Switch:
    """Whether the generator answers NaN."""

    on = False


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Switch:
    switch, whole = Switch(), ToyBoxPolicy.velocity

    def velocity(self: ToyBoxPolicy, *arguments: Any) -> Tensor:
        answer = whole(self, *arguments)
        return answer * torch.nan if switch.on else answer

    monkeypatch.setattr(ToyBoxPolicy, "velocity", velocity)
    return switch


def test_commands_that_draw_end_with_words(
    broken: Switch, four: Path, toybox_data: Path, tmp_path: Path, make_config: Callable[..., Config],
    display: Display, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    broken.on = True
    reference = toybox_data / "train" / "references" / "train-00000.png"
    out, prompt = tmp_path / "out.png", "a star on the beach"
    with pytest.raises(NotFinite, match=f"1 of 1 {SAID}"):
        write_pictures(Options(run=four, reference=[reference], prompt=prompt, out=out))
    with pytest.raises(NotFinite, match=f"evaluation: 3 of 3 {SAID}"):
        evaluate_run(four, toybox_data / "test", 3, display)
    with pytest.raises(NotFinite, match=SAID):
        diagnose(make_config(), tmp_path / "diagnosis", display, prompts=2, group_size=2, batches=2)
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--run", str(four), "--reference", str(reference), "--prompt", prompt, "--out", str(out)])
    assert ended.value.code == 1 and "not finite" in capsys.readouterr().err
    assert not out.exists()


def test_a_run_ends_before_the_update_and_goes_on_from_the_last_whole_iteration(
    broken: Switch, make_config: Callable[..., Config], run_training: RunTraining, monkeypatch: pytest.MonkeyPatch,
    read_log: Callable[[Path], list[dict[str, Any]]],
) -> None:  # fmt: skip
    step = Trainer.train_step

    def break_the_third(self: Trainer[Any], *arguments: Any) -> Metrics:
        broken.on = self.iteration == 2
        return step(self, *arguments)

    config = make_config({"iterations": 3, "evaluation.every": 99})
    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train_step", break_the_third)
        with pytest.raises(NotFinite, match=f"iteration 3: 8 of 8 {SAID}"):
            run_training(config)
    assert [path.name for path in list_checkpoints(config.output / "checkpoints")] == ["000002"]
    broken.on = False
    run_training(config, resume=True)
    assert [row["iteration"] for row in read_log(config.output / "metrics.jsonl")] == [1, 2, 3]


def test_a_base_that_draws_none_is_told_before_training(
    broken: Switch, make_config: Callable[..., Config], run_training: RunTraining
) -> None:
    broken.on = True
    config = make_config()
    with pytest.raises(NotFinite, match=f"evaluation: 2 of 2 {SAID}"):
        run_training(config)
    assert not list_checkpoints(config.output / "checkpoints")


def test_a_benchmark_ends_with_words(
    broken: Switch, four: Path, toybox_data: Path, tmp_path: Path, display: Display
) -> None:
    broken.on = True
    asked = {"benchmark": "folder", "data": toybox_data / "test", "num_steps": 2, "output": tmp_path / "benchmark"}
    with pytest.raises(NotFinite, match=f"4 of 4 {SAID}"):
        run_benchmark(BenchmarkConfig.model_validate(asked | {"adapter": four}), display)
