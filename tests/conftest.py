"""A ToyBox with untrained networks, data exported from it, and small runs on both."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported: no test reaches a hub

import pytest
import torch
from second_device import ASKED_FOR, second_device

if ASKED_FOR:
    second_device()  # first: what follows has torch look for devices, which it does once

from fork_server import ForkServer, Process, fork_server
from markupsafe import Markup
from rich.console import Console
from torch import Tensor

from customized_grpo.config.run import Config, set_dotted
from customized_grpo.data import SubjectDataset
from customized_grpo.factory.policy import build_policy
from customized_grpo.factory.rewards import build_rewards
from customized_grpo.report.charts import Chart
from customized_grpo.rewards.reward import Reward, Scores
from customized_grpo.toybox.encoders import IdentityEncoder, JudgeNetwork, PromptEncoder
from customized_grpo.toybox.export import export
from customized_grpo.toybox.network import Generator
from customized_grpo.toybox.policy import ToyBoxPolicy
from customized_grpo.toybox.quality import measure_quality
from customized_grpo.toybox.weights import IDENTITY_ENCODERS, QUALITY, save_network
from customized_grpo.tracking.console import Display
from customized_grpo.training.run import train
from customized_grpo.training.trainer import Trainer
from customized_grpo.types import PromptBatch

ROOT = Path(__file__).parents[1]
SMALL: dict[str, Any] = {
    "iterations": 2,
    "threads": 1,
    "policy.lora_rank": 4,
    "policy.precision": "fp32",
    "rollout.prompts_per_iteration": 2,
    "rollout.group_size": 4,
    "rollout.num_steps": 4,
    "optimizer.num_minibatches": 1,
    "evaluation.every": 2,
    "evaluation.num_samples": 2,
    "evaluation.num_test_samples": 3,
    "evaluation.gallery": 2,
    "evaluation.diversity_prompts": 1,
    "evaluation.diversity_images": 2,
}
"""What makes a run take seconds, by dotted name."""
FOUR = {"iterations": 4, "checkpoint.every": 2, "optimizer.num_minibatches": 2}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _light_reports(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the curves of reports, whose drawing takes a third of a small run; tests of reports draw them."""
    if request.path.parent.name != "report":
        monkeypatch.setattr(
            "customized_grpo.report.figures.line_chart",
            lambda title, unit, *_, **__: Chart(title, unit, Markup("<svg></svg>")),
        )


REWARDS = {
    "prompt": {"kind": "toybox_prompt", "schedule": "early"},
    "identity": {"kind": "toybox_identity", "schedule": "late"},
}


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained weights of the true architecture; the layers that start at zero do not, so outputs are not trivial."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    networks = {
        "generator": Generator(),
        **{name: IdentityEncoder() for name in IDENTITY_ENCODERS},
        "prompt_encoder": PromptEncoder(),
        "judge": JudgeNetwork(),
    }
    denoiser = networks["generator"].denoiser
    for layer in (denoiser.modulation, denoiser.last_modulation, denoiser.last):
        torch.nn.init.normal_(layer.weight, std=0.05)
        torch.nn.init.normal_(layer.bias, std=0.05)
    for name, network in networks.items():
        save_network(network, folder, name)
    (folder / QUALITY).write_text(json.dumps(measure_quality(folder, pairs=4)))
    return folder


@pytest.fixture(scope="session")
def toybox_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the exported datasets `train` (12 pairs) and `test` (4 pairs)."""
    folder = tmp_path_factory.mktemp("data")
    export(folder / "train", "train", 12)
    export(folder / "test", "test", 4)
    return folder


@pytest.fixture
def make_settings(tmp_path: Path, tiny_weights: Path, toybox_data: Path) -> Callable[..., dict[str, Any]]:
    """The settings of a small run as a tree, changed by dotted names; by default its output is `tmp_path/run`."""

    def make(changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
        paths = {"output": tmp_path / "run", "policy.toybox.weights": tiny_weights, "data.path": toybox_data / "train"}
        tree: dict[str, Any] = {"rewards": {name: dict(reward) for name, reward in REWARDS.items()}}
        for name, value in (SMALL | paths | dict(changes or {})).items():
            set_dotted(tree, name, str(value) if isinstance(value, Path) else value)
        return tree

    return make


@pytest.fixture
def make_config(make_settings: Callable[..., dict[str, Any]]) -> Callable[..., Config]:
    """`make_settings`, validated."""
    return lambda changes=None: Config.model_validate(make_settings(changes))


@pytest.fixture
def make_policy(tiny_weights: Path) -> Callable[..., ToyBoxPolicy]:
    """An untrained generator in fp32 with LoRA factors of rank 4, or as the settings say."""
    return lambda **settings: ToyBoxPolicy.load(tiny_weights, **{"precision": "fp32", "lora_rank": 4} | settings)


@pytest.fixture
def make_trainer(make_config: Callable[..., Config]) -> Callable[..., Trainer[Any]]:
    """The trainer of a small run, with its own rewards or the ones given."""

    def make(changes: Mapping[str, Any] | None = None, rewards: Sequence[Reward] | None = None) -> Trainer[Any]:
        config = make_config(changes)
        policy = build_policy(config.policy, config.seed)
        dataset = SubjectDataset.open(config.data.path)
        named = build_rewards(config) if rewards is None else dict(zip(("prompt", "identity"), rewards, strict=True))
        return Trainer(config, policy, named, dataset)

    return make


class FunctionReward(Reward):
    """A reward that is a function of the images [P, G, 3, H, W]; what is not finite is invalid."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function

    def score(self, images: Tensor, batch: PromptBatch) -> Scores:
        values = self.function(images)
        return Scores(values, values.isfinite())


@pytest.fixture
def reward_of() -> type[FunctionReward]:
    """Makes a reward of a function of the images."""
    return FunctionReward


@pytest.fixture
def display() -> Display:
    """Shows nothing; what was said is `display.console.file.getvalue()`."""
    import io

    return Display(Console(file=io.StringIO(), width=200))


@pytest.fixture
def run_training(display: Display) -> Callable[..., Path]:
    """`run.train` with a silent display."""
    return lambda config, **flags: train(config, display, **flags)


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run of four iterations without a stop lies, once one test made it."""
    return tmp_path_factory.mktemp("straight") / "run"


@pytest.fixture
def four(straight: Path, make_config: Callable[..., Config], run_training: Callable[..., Path]) -> Path:
    """The run of four iterations, a checkpoint every second."""
    if not straight.exists():
        run_training(make_config(FOUR | {"output": straight}))
    return straight


@pytest.fixture
def read_log() -> Callable[..., list[dict[str, Any]]]:
    """The rows of a log without the fields that hold times."""

    def read(path: Path) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [timeless(row) for row in rows]

    def timeless(row: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in row.items() if not k.startswith("seconds/") and k != "samples_per_second"}

    return read


@pytest.fixture
def repository() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture
def files_up_to() -> Callable[[int], AbstractContextManager[None]]:
    """Lets no file grow beyond so many bytes, as a full disk does. Nothing long may be printed within."""

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture(scope="session")
def forks() -> Iterator[ForkServer]:
    """A process with everything loaded, which is forked instead of starting Python again."""
    with fork_server() as server:
        yield server


@pytest.fixture
def python(forks: ForkServer, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Starts what `python` with some arguments would, in `tmp_path` or `cwd`, with the variables of `env` added.
    Whatever is left of the processes after the test is killed."""
    started: list[Process] = []

    def start(*arguments: object, env: Mapping[str, object] | None = None, cwd: Path = tmp_path) -> Process:
        added = {name: str(value) for name, value in (env or {}).items()}
        started.append(forks.start(*arguments, cwd=cwd, env=os.environ | added))
        return started[-1]

    yield start
    for process in started:
        process.kill_group()


@pytest.fixture
def run_python(python: Callable[..., Process]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs what `python` with some arguments would, to its end."""

    def run(*arguments: object, timeout: float = 300, **options: Any) -> subprocess.CompletedProcess[str]:
        process = python(*arguments, **options)
        out, err = process.communicate(timeout)
        return subprocess.CompletedProcess(process.args, process.wait(), out, err)

    return run


@pytest.fixture
def command(
    run_python: Callable[..., subprocess.CompletedProcess[str]],
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command in a process of its own, in `tmp_path`."""
    return lambda *arguments: run_python("-m", "customized_grpo", *arguments)


@pytest.fixture
def installed_command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the installed program, in `tmp_path`."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        program = Path(sys.executable).with_name("customized-grpo")
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [str(program), *map(str, arguments)],
            capture_output=True, text=True, cwd=tmp_path, env=environment, check=False,
        )  # fmt: skip

    return run
