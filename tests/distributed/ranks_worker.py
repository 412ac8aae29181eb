"""One of several processes in which a check of `test_group.py` runs: `python ranks_worker.py CHECK FILE`.

FILE holds the settings of a small run, as JSON.
"""

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from customized_grpo.config.run import Config
from customized_grpo.distributed import heartbeat
from customized_grpo.distributed.group import DistributedGroup, init_distributed
from customized_grpo.distributed.termination import SignalHandler, Terminated
from customized_grpo.errors import TrainingError, UserError
from customized_grpo.factory.data import load_dataset
from customized_grpo.factory.policy import build_policy
from customized_grpo.factory.rewards import build_rewards
from customized_grpo.training.trainer import Trainer


def exchange(ranks: DistributedGroup, settings: dict[str, Any]) -> None:
    """Sums, rows of uneven numbers, what differs, and the shares of work."""
    rank, world = ranks.rank, ranks.world_size
    tensors = [torch.full((2, 3), float(rank + 1)), torch.arange(5.0) * (rank + 1)]
    ranks.all_reduce_(tensors)
    factor = sum(range(1, world + 1))
    assert torch.equal(tensors[0], torch.full((2, 3), float(factor)))
    assert torch.equal(tensors[1], torch.arange(5.0) * factor)
    rows = ranks.gather(torch.full((rank, 2), rank, dtype=torch.int64))
    assert rows.tolist() == [[r, r] for r in range(world) for _ in range(r)]
    assert ranks.gather(torch.tensor([rank == 0])).tolist() == [True] + [False] * (world - 1)
    assert ranks.gather(torch.zeros(0, 4)).shape == (0, 4)
    assert ranks.mismatched_ranks(torch.tensor([7, 7])) == []
    assert ranks.mismatched_ranks(torch.tensor([7, rank])) == list(range(1, world))
    for count in (world, 7, 1, 0):
        assert [i for r in range(world) for i in ranks.local_range(count, r)] == list(range(count))


def failing(ranks: DistributedGroup, settings: dict[str, Any]) -> None:
    """An error in the last process is the first's too, under the other's name, and the others end quietly."""
    try:
        with ranks.synchronized():
            if ranks.rank == ranks.world_size - 1:
                raise UserError("field: found 3, expected 4")
    except UserError as error:
        assert (
            ranks.is_main_process
            and str(error) == f"process {ranks.world_size - 1} of {ranks.world_size}: field: found 3, expected 4"
        )
        raise SystemExit(5) from error
    except SystemExit as end:
        assert not ranks.is_main_process and end.code == 1
        raise


def hung(ranks: DistributedGroup, settings: dict[str, Any]) -> None:
    """SIGTERM to one process ends what another does alone, and waits for."""
    start = time.monotonic()
    try:
        with ranks.synchronized(), ranks.interruptible():
            if ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(300)
    except Terminated:
        assert time.monotonic() - start < 100
        raise SystemExit(143) from None


def frozen(ranks: DistributedGroup, settings: dict[str, Any]) -> None:
    """All are stopped for longer than silence may last, and go on: none is taken for gone."""
    wake = f"sleep {settings['stopped']}; kill -CONT {os.getpid()}"
    subprocess.Popen(["sh", "-c", wake], start_new_session=True)
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(settings["silence"] + settings["interval"])
    with ranks.synchronized():
        pass
    raise SystemExit(5)


def told_to_end(ranks: DistributedGroup, settings: dict[str, Any]) -> None:
    """SIGTERM that one process heard ends all of them at the same place."""
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    try:
        with ranks.synchronized():
            pass
    except Terminated:
        raise SystemExit(143) from None


def not_finite(ranks: DistributedGroup, settings: dict[str, Any]) -> None:
    """What goes wrong in the update of one process stops all before the update, which is not made."""
    trainer = small_trainer(ranks, settings)
    before = [parameter.detach().clone() for _, parameter in trainer.policy.trainable_parameters()]
    poison(trainer, ranks, settings["poison"])
    try:
        trainer.train_step()
    except TrainingError as error:
        said = {"memory": "process 1 of 2: out of memory while computing gradients in iteration 1 (CUDA out of memory"}
        assert ranks.is_main_process and said.get(settings["poison"], "iteration 1: the loss is") in str(error), error
        assert "rocess 1 of 2" in str(error), error
    except SystemExit:
        assert not ranks.is_main_process
    else:
        raise AssertionError("the update was made")
    after = [parameter for _, parameter in trainer.policy.trainable_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    raise SystemExit(5)


def poison(trainer: Trainer[Any], ranks: DistributedGroup, what: str) -> None:
    velocity = trainer.policy.velocity

    def poisoned(latents: Tensor, sigma: Tensor, condition: Any) -> Tensor:
        found = velocity(latents, sigma, condition)
        if ranks.rank != 1 or not torch.is_grad_enabled():
            return found
        if what == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if what == "loss":
            return found * float("nan")
        found.register_hook(lambda gradient: gradient * float("inf"))
        return found

    trainer.policy.velocity = poisoned  # type: ignore[method-assign]


def failed_rewards(ranks: DistributedGroup, settings: dict[str, Any]) -> None:
    """Rewards that fail in one process count among those of all, and stop all above the share."""
    trainer = small_trainer(ranks, settings)
    for reward in trainer.rewards.values():
        score = reward.score

        def broken(images: Tensor, batch: Any, score: Any = score) -> Any:
            scores = score(images, batch)
            return type(scores)(scores.values * float("nan"), scores.valid & False) if ranks.rank == 1 else scores

        reward.score = broken  # type: ignore[method-assign]
    try:
        trainer.train_step()
    except TrainingError as error:
        assert ranks.is_main_process and "67% of the prompt rewards could not be computed" in str(error), error
    except SystemExit:
        assert not ranks.is_main_process
    else:
        raise AssertionError("the rewards were taken")
    raise SystemExit(5)


def small_trainer(ranks: DistributedGroup, settings: dict[str, Any]) -> Trainer[Any]:
    config = Config.model_validate(settings["config"])
    policy = build_policy(config.policy, config.seed)
    dataset = load_dataset(config.data.path, config, policy)
    return Trainer(config, policy, build_rewards(config), dataset, ranks)


CHECKS: dict[str, Callable[[DistributedGroup, dict[str, Any]], None]] = {
    check.__name__: check for check in (exchange, failing, hung, frozen, told_to_end, not_finite, failed_rewards)
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(200, exit=True)  # where it hangs, if it does
    termination = SignalHandler()
    chosen = json.loads(Path(sys.argv[2]).read_text())
    if chosen.get("late_rank") == int(os.environ["RANK"]):
        connect = torch.distributed.init_process_group
        torch.distributed.init_process_group = lambda *args, **keys: (connect(*args, **keys), time.sleep(2))
    heartbeat.HEARTBEAT_INTERVAL = chosen.get("interval", heartbeat.HEARTBEAT_INTERVAL)
    with termination.listening(), init_distributed(termination, chosen.get("silence", 20.0)) as group:
        assert group.world_size == int(os.environ["WORLD_SIZE"])
        CHECKS[sys.argv[1]](group, chosen)
