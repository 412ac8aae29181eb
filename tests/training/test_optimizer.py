"""AdamW with moments of 32 and of 8 bits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import QUANTIZATION
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from customized_grpo.cli.main import main
from customized_grpo.config.training import OptimizerConfig
from customized_grpo.errors import UserError
from customized_grpo.training import optimizer
from customized_grpo.training.checkpoint import State
from customized_grpo.training.optimizer import build_optimizer, check_optimizer, moment_bytes

CPU = torch.device("cpu")
EIGHT = OptimizerConfig(kind="adamw_8bit", learning_rate=1e-2)


def network() -> nn.Module:
    """A matrix whose moments take 8 bits, in blocks that do not come out even, and a bias whose do not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(67, 64)


def steps(model: nn.Module, made: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        data = torch.randn(16, 67, generator=torch.Generator().manual_seed(number))
        (model(data) - data[:, :64]).square().mean().backward()
        made.step()
        made.zero_grad()


def state(model: nn.Module, settings: OptimizerConfig) -> State:
    return State(list(model.named_parameters()), build_optimizer(settings, list(model.parameters())))


def test_the_bytes_of_moments() -> None:
    parameters = [torch.zeros(64, 67), torch.zeros(64)]
    assert moment_bytes(OptimizerConfig(), parameters) == 2 * 4 * (64 * 67 + 64)
    assert moment_bytes(EIGHT, parameters) == 2 * (64 * 67 + 4 * 17) + 2 * 4 * 64  # 16.75 blocks of 256


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^optimizer\.kind: adamw_8bit takes bitsandbytes, which is not installed"):
        check_optimizer(EIGHT, CPU)
    check_optimizer(OptimizerConfig(), CPU)


def test_a_device_without_kernels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer.importlib.util, "find_spec", lambda name: object())
    with pytest.raises(UserError, match=r"^optimizer\.kind: adamw_8bit runs on cuda, xpu and cpu, not on mps"):
        check_optimizer(EIGHT, torch.device("mps"))


class TestEightBits:
    pytestmark = QUANTIZATION

    def test_weights_go_where_those_of_32_bits_go(self) -> None:
        ends = []
        for settings in (OptimizerConfig(learning_rate=1e-2), EIGHT):
            model = network()
            before = model.weight.detach().clone()
            steps(model, build_optimizer(settings, list(model.parameters())), range(30))
            ends.append(model.weight.detach() - before)
        assert (ends[0] - ends[1]).norm() < 0.05 * ends[0].norm()
        assert not torch.equal(*ends)

    def test_the_state_is_as_small_as_told(self) -> None:
        model = network()
        kept = state(model, EIGHT)
        steps(model, kept.optimizer, range(1))
        saved = {name: each for name, each in kept.tensors().items() if name.startswith("optimizer/")}
        moments = {name: each for name, each in saved.items() if not name.endswith("/step")}
        assert sum(each.nbytes for each in moments.values()) == moment_bytes(EIGHT, list(model.parameters()))
        assert {name.rsplit("/", 1)[1] for name in saved} == {"step", "state1", "state2", "absmax1", "absmax2"}

    def test_a_restored_state_goes_on_to_the_bit(self, tmp_path: Path) -> None:
        straight, stopped, resumed = network(), network(), network()
        steps(straight, state(straight, EIGHT).optimizer, range(6))
        first = state(stopped, EIGHT)
        steps(stopped, first.optimizer, range(3))
        save_file(first.tensors(), tmp_path / "state.safetensors")
        second = state(resumed, EIGHT)
        found = load_file(tmp_path / "state.safetensors")
        assert second.mismatch(found) == ""
        second.restore(found)
        steps(resumed, second.optimizer, range(3, 6))
        assert torch.equal(resumed.weight, straight.weight) and torch.equal(resumed.bias, straight.bias)

    def test_moments_of_32_bits_do_not_fit(self) -> None:
        other = state(network(), OptimizerConfig())
        model = network()
        own = state(model, EIGHT)
        steps(model, own.optimizer, range(1))
        assert other.mismatch(own.tensors()) == "it lacks optimizer/bias/exp_avg"

    def test_a_run_resumes_to_the_bit(
        self, make_settings: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(optimizer, "SMALLEST_8BIT", 16)

        def run(name: str, *more: str) -> dict[str, Tensor]:
            settings = make_settings({"output": tmp_path / name, "optimizer.kind": "adamw_8bit"})
            (file := tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings))
            main(["train", "--config", str(file), *more])
            return load_file(sorted((tmp_path / name / "checkpoints").iterdir())[-1] / "state.safetensors")

        straight = run("straight", "--iterations=2")
        run("run", "--iterations=1")
        resumed = run("run", "--iterations=2", "--resume")
        assert straight.keys() == resumed.keys() and any(name.endswith("/absmax1") for name in straight)
        assert all(torch.equal(straight[name], resumed[name]) for name in straight)
