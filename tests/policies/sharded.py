"""What the processes of `test_shard.py` run: `python sharded.py FOLDER WHAT,... PORT ...`."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from customized_grpo.config.policy import PolicyConfig
from customized_grpo.config.run import Config
from customized_grpo.distributed.group import DistributedGroup, init_distributed
from customized_grpo.distributed.lockstep import LockstepForward
from customized_grpo.distributed.termination import SignalHandler, Terminated
from customized_grpo.errors import UserError
from customized_grpo.tracking.console import Display

KINDS = ("flux1-kontext", "flux2-klein", "qwen-image-edit-plus")
"""Every class of transformer, with guidance and without."""
RUNS = (("whole", False, 2), ("sharded", True, 2), ("whole", True, 3), ("sharded", False, 3))
"""(name, whether sharded, iterations it goes to)."""


class Bench:
    """Counts the runs of a transformer that all must run together; each adds one to a weight's gradient."""

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.runs = 0
        self.lockstep = LockstepForward(self.run)

    def run(self) -> Tensor:
        self.runs += 1
        met = torch.ones(1)
        dist.all_reduce(met)
        return met * self.weight

    def velocity(self, runs: int) -> Tensor:
        return self.lockstep.forward(runs, lambda: torch.stack([self.run() for _ in range(runs)]).sum())


def shares(ranks: DistributedGroup, folder: Path) -> None:
    """Unequal shares, and none: all run equally often, and idle runs leave no gradient."""
    bench = Bench()
    with ranks.synchronized(), bench.lockstep.phase(ranks):
        for runs in [3, 1][: 2 - 2 * ranks.rank]:
            bench.velocity(runs)
    assert bench.runs == 4, bench.runs
    with ranks.synchronized(), bench.lockstep.phase(ranks):
        for runs in ([1, 1, 2], [2])[ranks.rank]:
            with torch.no_grad():
                bench.velocity(1)
            bench.velocity(runs).backward()
    assert bench.runs == 4 + 3 + 5, bench.runs
    assert bench.weight.grad == (4, 2)[ranks.rank] * ranks.world_size, bench.weight.grad


def fails(ranks: DistributedGroup, folder: Path) -> None:
    """One fails between runs, after the others' share or before: they leave at once, and the first tells why."""
    cases = [(1, 9, 2), (1, 1, 2), (0, 9, 2), (0, 1, 2), (0, 9, 0), (1, 0, 0)]
    for kind, (failing, works, runs) in product((UserError, OSError), cases):
        bench, fresh = Bench(), DistributedGroup(ranks.rank, ranks.world_size)
        found: BaseException | None = None
        try:
            with fresh.synchronized(), bench.lockstep.phase(fresh):
                for _ in range(runs if ranks.rank == failing else works):
                    bench.velocity(1)
                if ranks.rank == failing:
                    raise kind("a file is damaged")
        except (UserError, SystemExit) as error:
            found = error
        told = "a file is damaged" if kind is UserError else "input: a file is damaged"
        told = told if failing == 0 else f"process 1 of 2: {told}"
        assert str(found) == (told if ranks.is_main_process else "1"), found
        assert bench.runs == runs, (bench.runs, runs)


def stops(ranks: DistributedGroup, folder: Path) -> None:
    """One is told to end while the other idles: both end."""
    fresh = DistributedGroup(ranks.rank, ranks.world_size)
    try:
        with fresh.synchronized(), Bench().lockstep.phase(fresh):
            if ranks.rank == 0:
                raise Terminated
    except Terminated:
        return
    raise AssertionError("it went on")


def dies(ranks: DistributedGroup, folder: Path) -> None:
    """One is killed while the others wait for it in a run."""
    bench = Bench()
    with ranks.synchronized(), bench.lockstep.phase(ranks):
        for number in range(3):
            if ranks.rank == 1 and number == 2:
                bench.lockstep.forward(1, lambda: os.kill(os.getpid(), signal.SIGKILL))
            bench.velocity(1)


def family(ranks: DistributedGroup, folder: Path) -> None:
    """What `families` checks, of one class of transformer."""
    families(ranks, folder, KINDS[:1])


def families(ranks: DistributedGroup, folder: Path, kinds: Sequence[str] = KINDS) -> None:
    """Velocities and gradients of sharded transformers are those of whole ones, of which each process has its part."""
    _align_weights()
    for kind in kinds:
        whole, sharded = (_policy(kind, folder, shard) for shard in (False, True))
        references = [[torch.full((3, 64, side), 0.3)] for side in (64, 96)[ranks.rank :]]
        prompts = ["a cat", "a dog"][: len(references)]
        condition = whole.encode(prompts, references)
        draw = torch.Generator().manual_seed(ranks.rank)
        latents = torch.randn(len(prompts), *whole.latent_shape, generator=draw)
        found = []
        for policy in (whole, sharded):
            with policy.lockstep(ranks):
                pass  # a phase without work
            sigma = torch.full((len(prompts),), 0.7)
            with policy.lockstep(ranks):
                with torch.no_grad(), policy.base_weights():
                    base_weights = policy.velocity(latents, sigma, condition)
                for _ in range(2 - ranks.rank):
                    velocity = policy.velocity(latents, sigma, condition)
                    velocity.square().mean().backward()
            with policy.lockstep(ranks), torch.no_grad():
                if ranks.is_main_process:
                    policy.velocity(latents, sigma, condition)
            gradients = [parameter.grad for _, parameter in policy.trainable_parameters()]
            found.append([base_weights, velocity.detach(), *gradients])
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-6)
        assert any(gradient.abs().max() > 1e-4 for gradient in gradients), kind
        _check_share(kind, whole, sharded, ranks)
        _check_adapter(whole, sharded, folder / f"{kind}-{ranks.rank}")


def _align_weights() -> None:
    """Weights mapped from a file lie where they happen to, and products round by that; FSDP's own do not."""
    from customized_grpo.factory import pipelines
    from customized_grpo.policies import loading

    def load_pipeline(*arguments: Any) -> Any:
        pipe = loading.load_pipeline(*arguments)
        for parameter in pipe.transformer.parameters():
            parameter.data = parameter.data.clone()
        return pipe

    pipelines.load_pipeline = load_pipeline


def _policy(kind: str, folder: Path, shard: bool) -> Any:
    from customized_grpo.factory.pipelines import load_policy

    config = PolicyConfig.model_validate(
        {
            "kind": kind, "lora_rank": 4, "lora_alpha": 4,
            "pipeline": {
                "model": str(folder / kind), "height": 64, "width": 96, "cache": folder / "conditions",
                "reference_side": 64, "fsdp": shard,
            },
        }
    )  # fmt: skip
    policy = load_policy(config, 0, torch.device("cpu"), bf16=False)
    draw = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for _, parameter in policy.trainable_parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
    return policy


def _check_share(kind: str, whole: Any, sharded: Any, ranks: DistributedGroup) -> None:
    from torch.distributed.tensor import DTensor

    frozen = [p for p in sharded._transformer.parameters() if not p.requires_grad]
    assert all(isinstance(parameter, DTensor) for parameter in frozen), kind
    here = sum(parameter.to_local().untyped_storage().nbytes() for parameter in frozen)
    total = sum(p.nbytes for p in whole._transformer.parameters() if not p.requires_grad)
    assert here <= total / ranks.world_size * 1.05, (kind, here, total)
    # And what was gathered is let go.
    gathered = [
        output
        for module in sharded._transformer.modules()
        if hasattr(module, "_get_fsdp_state")
        for group in module._get_fsdp_state()._fsdp_param_groups
        for parameter in group.fsdp_params
        for output in parameter.all_gather_outputs
    ]
    assert gathered
    assert not any(output.untyped_storage().nbytes() for output in gathered), kind


def _check_adapter(whole: Any, sharded: Any, folder: Path) -> None:
    """An adapter of the sharded generator fits the whole one, and the other way round."""
    sharded.save_adapter(folder)
    for _, parameter in whole.trainable_parameters():
        parameter.data.zero_()
    whole.load_adapter(folder)
    for _, parameter in sharded.trainable_parameters():
        parameter.data.zero_()
    whole.save_adapter(folder)
    sharded.load_adapter(folder)
    for (_, one), (_, other) in zip(whole.trainable_parameters(), sharded.trainable_parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.abs().max() > 0


def runs(folder: Path, ports: list[str]) -> None:
    """A run with whole weights and one with sharded ones; then each goes on as the other."""
    from customized_grpo.training.run import train

    _align_weights()
    settings = json.loads((folder / "settings.json").read_text())
    for name, shard, iterations in RUNS:
        os.environ["MASTER_PORT"] = ports.pop()
        settings |= {"output": str(folder / name), "iterations": iterations}
        settings["policy"]["pipeline"]["fsdp"] = shard
        train(Config.model_validate(settings), Display.silent(), resume=iterations > 2)
        if os.environ["RANK"] == "0":
            shutil.copytree(folder / name, folder / f"{name}-{iterations}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, work, *ports = Path(sys.argv[1]), *sys.argv[2:]
    for each in work.split(","):
        if each == "runs":
            runs(folder, ports)
            continue
        os.environ["MASTER_PORT"] = ports.pop()
        with init_distributed(SignalHandler(), silence=3.0) as ranks:
            {part.__name__: part for part in (shares, fails, stops, dies, family, families)}[each](ranks, folder)
