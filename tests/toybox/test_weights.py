from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from customized_grpo.errors import UserError
from customized_grpo.toybox.encoders import IdentityEncoder, JudgeNetwork
from customized_grpo.toybox.network import Generator
from customized_grpo.toybox.weights import NAMES, load_network, read_quality, save_network


def test_weights_are_read_back_in_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = IdentityEncoder()
    save_network(network, tmp_path, "identity_encoder")
    loaded = load_network(IdentityEncoder(), "identity_encoder", tmp_path)
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.bfloat16().float())


def test_loaded_weights_are_frozen_fp32(tmp_path: Path) -> None:
    save_network(JudgeNetwork(), tmp_path, "judge")
    network = load_network(JudgeNetwork(), "judge", tmp_path)
    assert not network.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in network.parameters())


def test_missing_weights_are_named_with_the_command_that_makes_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"judge.safetensors.*toybox pretrain"):
        load_network(JudgeNetwork(), "judge", tmp_path)


def test_weights_of_another_network_or_broken_ones_are_refused(tmp_path: Path) -> None:
    save_network(IdentityEncoder(), tmp_path, "judge")
    with pytest.raises(UserError, match="not weights of ToyBox's judge"):
        load_network(JudgeNetwork(), "judge", tmp_path)
    (tmp_path / "judge.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not weights of ToyBox's judge"):
        load_network(JudgeNetwork(), "judge", tmp_path)


def test_no_file_is_larger_than_ten_megabytes(tiny_weights: Path) -> None:
    for name in NAMES:
        assert (tiny_weights / f"{name}.safetensors").stat().st_size <= 10_000_000


def test_what_was_measured_stands_beside_the_weights(tiny_weights: Path) -> None:
    assert {"judge", "ceiling", "base", "chance"} <= read_quality(tiny_weights).keys()


def test_weights_that_are_not_finite_are_refused(tiny_weights: Path, tmp_path: Path) -> None:
    state = load_file(tiny_weights / "generator.safetensors")
    state["denoiser.last.bias"][0] = torch.inf
    save_file(state, tmp_path / "generator.safetensors")
    with pytest.raises(UserError, match=r"generator\.safetensors: 1 of its .* not finite \(denoiser\.last\.bias\)"):
        load_network(Generator(), "generator", tmp_path)
