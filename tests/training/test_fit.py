"""Settings that bring a run under a limit of memory."""

import math
import re
from typing import Any

import pytest

from customized_grpo.cli.main import main
from customized_grpo.config.run import Config
from customized_grpo.training.estimate import Estimate
from customized_grpo.training.fit import GIB, MARGIN, Fit, fitted, roomier

REWARDS = {"prompt": {"kind": "clip_t"}, "identity": {"kind": "dino"}}


def config(**pipeline: Any) -> Config:
    policy = {"kind": "flux1-kontext", "lora_rank": 64, "lora_alpha": 128, "pipeline": pipeline}
    batches = {"rollout": {"micro_batch": 4}, "optimizer": {"micro_batch": 2}}
    return Config.model_validate({"policy": policy, "rewards": REWARDS} | batches)


def pretended(asked: Config) -> Estimate:
    """24 GiB of weights, a tenth of them if blocks wait; 1 GiB a sample, five times that without checkpointing; and
    1 GiB for 16 of the rank."""
    pipeline = asked.policy.pipeline
    sample = 1.0 + 4.0 / (pipeline.keep_every or math.inf) if pipeline.gradient_checkpointing else 5.0
    weights = 24.0 / (10 if pipeline.block_offload else 1) / (2 if pipeline.quantization == "int8" else 1)
    update = {"activations": GIB * sample * asked.optimizer.micro_batch}
    rollout = {"activations": GIB * 0.5 * asked.rollout.micro_batch}
    trained = asked.policy.lora_rank / (16 if asked.optimizer.kind == "adamw" else 32)
    memory = {"weights": GIB * weights, "trained": GIB * trained}
    return Estimate(1, 1, {}, 0.0, memory, {"rollout": rollout, "update": update})


@pytest.fixture(autouse=True)
def _no_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("customized_grpo.training.fit.find_spec", lambda name: None)


def test_the_cheapest_come_first() -> None:
    tried: list[Fit] = []
    found = fitted(config(gradient_checkpointing=False), 8.0, pretended, tried.append)
    assert found is not None
    assert [list(fit.changes)[-1] for fit in tried][:4] == [
        "policy.pipeline.gradient_checkpointing", "optimizer.micro_batch", "optimizer.micro_batch",
        "policy.pipeline.block_offload",
    ]  # fmt: skip
    assert found.estimate.peak_bytes <= MARGIN * 8 * GIB
    assert found.options == (
        "--policy.pipeline.gradient_checkpointing true --policy.pipeline.block_offload true --policy.lora_rank 32 "
        "--policy.lora_alpha 64"
    )


def test_what_is_not_needed_is_taken_back() -> None:
    tried: list[Fit] = []
    found = fitted(config(), 12.0, pretended, tried.append)
    assert found is not None and found.options == "--policy.pipeline.block_offload true"
    # Micro-batches of 2 (rollout) and of 1, then the blocks, and these without either of the former.
    assert len(tried) == 5


def test_moments_in_8_bits_come_before_a_coarser_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the libraries are there."""
    monkeypatch.setattr("customized_grpo.training.fit.find_spec", lambda name: object())
    found = fitted(config(), 31.5, pretended)
    assert found is not None and found.options == "--optimizer.kind adamw_8bit"
    found = fitted(config(), 24.0, pretended)
    assert found is not None and found.options == "--policy.pipeline.quantization int8"


def test_an_adapter_that_training_starts_from_keeps_its_rank() -> None:
    started = config().model_copy(update={"policy": config().policy.model_copy(update={"init_from": "some/adapter"})})
    assert fitted(started, 6.0, pretended) is None


def test_blocks_wait_where_compilation_is_given_up() -> None:
    found = fitted(config(compile=True), 12.0, pretended)
    assert found is not None
    assert found.options == "--policy.pipeline.block_offload true --policy.pipeline.compile false"


def test_room_is_for_activations() -> None:
    tried: list[Fit] = []
    needs = pretended(config()).peak_bytes / GIB
    found = roomier(config(), (needs + 5) / MARGIN, pretended, tried.append)
    assert found is not None and found.options == "--policy.pipeline.keep_every 2"
    assert [fit.options for fit in tried[:-1]] == [
        "--policy.pipeline.gradient_checkpointing false --policy.pipeline.keep_every null"
    ]
    found = roomier(config(), (needs + 8) / MARGIN, pretended)
    assert found is not None and found.changes["policy.pipeline.gradient_checkpointing"] is False
    assert roomier(config(), (needs + 0.5) / MARGIN, pretended) is None
    assert (
        roomier(config(keep_every=4), (needs + 1) / MARGIN, pretended) is None
    )  # it recomputes no less than that already
    assert roomier(config(gradient_checkpointing=False), 100, pretended) is None


def test_a_rank_comes_last_and_keeps_its_scale() -> None:
    found = fitted(config(), 6.0, pretended)
    assert found is not None
    assert (found.changes["policy.lora_rank"], found.changes["policy.lora_alpha"]) == (32, 64)


def test_weights_are_quantized_where_the_library_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("customized_grpo.training.fit.find_spec", lambda name: object())
    found = fitted(config(), 20.0, pretended)
    assert found is not None and list(found.changes)[-1] == "policy.pipeline.quantization"


def test_what_does_not_go_together_is_left_out() -> None:
    found = fitted(config(quantization="nf4"), 20.0, pretended)
    assert found is None  # nf4 and blocks that wait exclude each other


def test_nothing_fits_into_nothing() -> None:
    assert fitted(config(), 1.0, pretended) is None


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("0.05", "an iteration takes .* in the .*; it takes 0.0 GiB with --rollout.micro_batch"),
        ("0.0001", "no setting that is tried here brings it under"),
    ],
)
def test_a_dry_run_says_what_fits(limit: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["train", "--config", "toybox", "--dry_run", "--gpu_memory", limit])
    assert caught.value.code == 2
    output = capsys.readouterr()
    assert "expected peak memory" in output.out
    assert re.search(words, " ".join(output.err.split()))


def test_a_limit_that_holds_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--config", "toybox", "--dry_run", "--gpu_memory", "24"])
    assert "with --" not in capsys.readouterr().out


def test_a_limit_belongs_to_a_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--gpu_memory", "24"], ["--dry_run", "--gpu_memory", "-1"]):
        with pytest.raises(SystemExit):
            main(["train", "--config", "toybox", *arguments])
        assert "--gpu_memory: GiB above 0" in capsys.readouterr().err
