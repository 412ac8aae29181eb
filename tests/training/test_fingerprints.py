"""What pins the result of a run: contents of weights, wherever they lie."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from customized_grpo.config.run import Config
from customized_grpo.data import SubjectDataset
from customized_grpo.distributed.group import DistributedGroup
from customized_grpo.errors import UserError
from customized_grpo.testing.tiny_pipelines import save_tiny
from customized_grpo.testing.tiny_rewards import save_tiny_reward
from customized_grpo.training.fingerprints import fingerprint, fingerprints
from customized_grpo.training.resume import pin


def pipeline(folder: Path, weights: bytes = b"weights") -> Path:
    """Files as those of a pipeline are named."""
    for name, content in {
        "model_index.json": b"{}",
        "transformer/config.json": b"{}",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors": weights,
        "text_encoder/model.safetensors": b"text",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def test_weights_may_lie_anywhere(tmp_path: Path) -> None:
    assert fingerprint(pipeline(tmp_path / "a")) == fingerprint(str(pipeline(tmp_path / "b" / "c")))


def test_other_weights_at_the_same_path_are_noticed(tmp_path: Path) -> None:
    before = fingerprint(pipeline(tmp_path))
    assert fingerprint(pipeline(tmp_path, weights=b"others!")) != before
    pipeline(tmp_path)
    (tmp_path / "transformer" / "config.json").write_bytes(b"{ }")
    assert fingerprint(tmp_path) != before


@pytest.mark.parametrize(
    "name",
    ["README.md", "flux1.safetensors", "transformer/diffusion_pytorch_model.fp16.safetensors",
     ".cache/huggingface/model.safetensors", "transformer/.lock", "onnx/model.onnx"],
)  # fmt: skip
def test_what_libraries_do_not_load_decides_nothing(name: str, tmp_path: Path) -> None:
    before = fingerprint(pipeline(tmp_path))
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"more")
    assert fingerprint(tmp_path) == before


def test_a_file_of_the_hub_is_known_by_its_name_and_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cache names large files by their SHA-256, so the same files downloaded into a folder are the same."""
    local = pipeline(tmp_path / "local")
    cache = tmp_path / "hub" / "models--owner--name"
    snapshot = cache / "snapshots" / "main"
    (cache / "blobs").mkdir(parents=True)
    for path in (each for each in local.rglob("*") if each.is_file()):
        blob = cache / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        if path.suffix == ".safetensors":
            blob.write_bytes(b"")  # whoever read it would find something else
        else:
            shutil.copyfile(path, blob)
        link = snapshot / path.relative_to(local)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    monkeypatch.setattr("customized_grpo.training.fingerprints.snapshot_download", lambda name, **how: str(snapshot))
    assert fingerprint("owner/name") == fingerprint(local)
    one = "text_encoder/model.safetensors"
    assert fingerprint(f"owner/name/{one}") == fingerprint(local / one) != fingerprint(local)


def lora(path: Path, *, swapped: bool = False) -> Path:
    """A file of one tensor, whose header has its two entries in either order."""
    entries = {"__metadata__": {"format": "pt"}, "w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    header = json.dumps(dict(reversed(entries.items())) if swapped else entries).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\x80\x3f")
    return path


def test_an_adapter_saved_again_is_the_same_and_its_settings_count(
    tmp_path: Path, make_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine.safetensors"
    monkeypatch.setattr("customized_grpo.training.fingerprints.init_adapter", lambda policy: path)

    def found() -> str:
        return fingerprints(make_config())["policy.init_from"]

    lora(path)
    before = found()
    lora(path, swapped=True)
    assert found() == before
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 64}')
    assert found() != before


def test_a_folder_without_weights_is_refused_and_a_hidden_one_is_read(tmp_path: Path) -> None:
    assert fingerprint(pipeline(tmp_path / ".hidden")) == fingerprint(pipeline(tmp_path / "shown"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: none of its files is one that a model is loaded from"):
        fingerprint(tmp_path / "empty")


def test_every_field_that_names_weights_is_pinned(tmp_path: Path) -> None:
    model = save_tiny("flux1-kontext", tmp_path / "model") or tmp_path / "model"
    rewards = {kind: save_tiny_reward(kind, tmp_path / kind) for kind in ("dino", "clip")}
    tree: dict[str, Any] = {
        "policy": {"kind": "flux1-kontext", "pipeline": {"model": str(model), "height": 64, "width": 64}},
        "rewards": {
            "prompt": {"kind": "clip_t", "clip_t": {"model": str(rewards["clip"])}},
            "identity": {"kind": "dino", "dino": {"model": str(rewards["dino"])}},
        },
    }
    found = fingerprints(Config.model_validate(tree))
    assert found.keys() == {
        "policy.pipeline.model", "rewards.prompt.clip_t.model", "rewards.identity.dino.model",
    }  # fmt: skip
    assert len(set(found.values())) == 3


@pytest.mark.parametrize("how", ["moved", "changed"])
def test_a_run_goes_on_with_the_same_weights_from_another_path(
    how: str, tmp_path: Path, make_config: Callable[..., Config], run_training: Callable[..., Path], tiny_weights: Path
) -> None:
    """ToyBox's are as those of any generator."""
    moved = shutil.copytree(tiny_weights, tmp_path / "moved")
    changes = {"iterations": 1, "evaluation.every": 5}
    run_training(make_config(changes))
    if how == "moved":
        run_training(make_config(changes | {"iterations": 2, "policy.toybox.weights": moved}), resume=True)
        return
    generator = moved / "generator.safetensors"
    content = bytearray(generator.read_bytes())
    content[-1] ^= 1
    generator.write_bytes(content)
    with pytest.raises(UserError, match=r"another configuration \(policy\.toybox\.weights\.sha256: [0-9a-f]{64} -> "):
        run_training(make_config(changes | {"iterations": 2, "policy.toybox.weights": moved}), resume=True)


def test_machines_with_other_data_or_weights_are_told_apart(
    make_config: Callable[..., Config], toybox_data: Path
) -> None:
    class Second(DistributedGroup):
        def broadcast_text(self, text: str) -> str:
            return json.dumps(json.loads(text) | {"policy.toybox.weights.sha256": "0" * 64})

    dataset = SubjectDataset.open(toybox_data / "train")
    with pytest.raises(UserError, match=r"other data or weights .*\(policy\.toybox\.weights\.sha256: 0{64} -> "):
        pin(make_config(), dataset, Second())
