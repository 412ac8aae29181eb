"""HPSv2 on a tiny CLIP: in transformers' layout, and as a file in open_clip's names, read by its own arithmetic."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from named_rewards import load_named
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from customized_grpo.config.rewards import RewardConfig
from customized_grpo.errors import UserError
from customized_grpo.rewards.open_clip import converted
from customized_grpo.rewards.preprocessing import Letterbox
from customized_grpo.testing.tiny_rewards import save_tiny_reward
from customized_grpo.types import PromptBatch

CPU = torch.device("cpu")
PROMPTS = ["a cat", "a much longer prompt of a dog in the deep snow"]
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HEADS, END = 2, 513
"""Of the tiny CLIP: heads of its attentions, and the token that ends a prompt."""


def published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tiny CLIP of transformers as open_clip would save it, written down part by part."""
    found = {"logit_scale": state["logit_scale"], "text_projection": state["text_projection.weight"].T.contiguous()}
    found["visual.proj"] = state["visual_projection.weight"].T.contiguous()
    for tower, prefix in (("vision_model", "visual."), ("text_model", "")):
        position = state[f"{tower}.embeddings.position_embedding.weight"]
        found[f"{prefix}positional_embedding"] = position
        for layer in range(2):
            old, new = f"{tower}.encoder.layers.{layer}", f"{prefix}transformer.resblocks.{layer}"
            for kind in ("weight", "bias"):
                thirds = [state[f"{old}.self_attn.{letter}_proj.{kind}"] for letter in ("q", "k", "v")]
                found[f"{new}.attn.in_proj_{kind}"] = torch.cat(thirds)
                found[f"{new}.attn.out_proj.{kind}"] = state[f"{old}.self_attn.out_proj.{kind}"]
                found[f"{new}.ln_1.{kind}"] = state[f"{old}.layer_norm1.{kind}"]
                found[f"{new}.ln_2.{kind}"] = state[f"{old}.layer_norm2.{kind}"]
                found[f"{new}.mlp.c_fc.{kind}"] = state[f"{old}.mlp.fc1.{kind}"]
                found[f"{new}.mlp.c_proj.{kind}"] = state[f"{old}.mlp.fc2.{kind}"]
    for kind in ("weight", "bias"):
        found[f"visual.ln_pre.{kind}"] = state[f"vision_model.pre_layrnorm.{kind}"]
        found[f"visual.ln_post.{kind}"] = state[f"vision_model.post_layernorm.{kind}"]
        found[f"ln_final.{kind}"] = state[f"text_model.final_layer_norm.{kind}"]
    found["visual.class_embedding"] = state["vision_model.embeddings.class_embedding"]
    found["visual.conv1.weight"] = state["vision_model.embeddings.patch_embedding.weight"]
    found["token_embedding.weight"] = state["text_model.embeddings.token_embedding.weight"]
    return found


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hpsv2")
    folder = save_tiny_reward("clip", root / "clip")
    # Larger weights than a fresh model's: with those any score is much like any other.
    draw = torch.Generator().manual_seed(5)
    state = {
        name: tensor + 0.3 * torch.randn(tensor.shape, generator=draw) if tensor.dim() else tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(published(state), root / "hps.safetensors")
    return {"clip": folder, "file": root / "hps.safetensors", "dino": save_tiny_reward("dino", root / "dino")}


def load(tiny: dict[str, Path], model: Path | str, **more: Any) -> Any:
    settings = {
        "prompt": "hpsv2", "hpsv2": {"model": str(model), "backbone": str(tiny["clip"])}, "identity": "dino",
        "dino": {"model": str(tiny["dino"])}, **more,
    }  # fmt: skip
    return load_named(settings)["prompt"]


def make_batch(height: int = 48, width: int = 48) -> tuple[Tensor, PromptBatch]:
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(4, 3, 6, 6, generator=draw)
    images = (F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1) * 255).round() / 255
    groups = images.unflatten(0, (2, 2))
    return groups, PromptBatch(PROMPTS, [[group[0]] for group in groups], None)


def block(state: dict[str, Tensor], name: str, x: Tensor, mask: Tensor | None) -> Tensor:
    """A residual block of open_clip on tokens [L, D]: torch's own attention on the joint matrix."""

    def part(key: str) -> tuple[Tensor, Tensor]:
        return state[f"{name}.{key}.weight"], state[f"{name}.{key}.bias"]

    width = x.shape[-1]
    normed = F.layer_norm(x, (width,), *part("ln_1"))[:, None]
    attended, _ = F.multi_head_attention_forward(
        normed, normed, normed, width, HEADS, state[f"{name}.attn.in_proj_weight"], state[f"{name}.attn.in_proj_bias"],
        None, None, False, 0.0, *part("attn.out_proj"), attn_mask=mask, need_weights=False,
    )  # fmt: skip
    x = x + attended[:, 0]
    inner = F.linear(F.layer_norm(x, (width,), *part("ln_2")), *part("mlp.c_fc"))
    return x + F.linear(inner * torch.sigmoid(1.702 * inner), *part("mlp.c_proj"))


def by_hand(state: dict[str, Tensor], pixels: Tensor, tokens: Tensor) -> Tensor:
    """open_clip's CLIP written out: the cosine of a preprocessed picture [3, h, w] and `tokens` [L], padded with 0."""
    patches = F.conv2d(pixels[None], state["visual.conv1.weight"], stride=16)[0].flatten(1).T
    x = torch.cat([state["visual.class_embedding"][None], patches]) + state["visual.positional_embedding"]
    x = F.layer_norm(x, x.shape[-1:], state["visual.ln_pre.weight"], state["visual.ln_pre.bias"])
    for layer in range(2):
        x = block(state, f"visual.transformer.resblocks.{layer}", x, None)
    x = F.layer_norm(x[0], x.shape[-1:], state["visual.ln_post.weight"], state["visual.ln_post.bias"])
    image = x @ state["visual.proj"]
    padded = F.pad(tokens, (0, 77 - len(tokens)))
    x = state["token_embedding.weight"][padded] + state["positional_embedding"]
    causal = torch.full((77, 77), -torch.inf).triu(1)
    for layer in range(2):
        x = block(state, f"transformer.resblocks.{layer}", x, causal)
    x = F.layer_norm(x, x.shape[-1:], state["ln_final.weight"], state["ln_final.bias"])
    text = x[int((padded == END).nonzero()[0])] @ state["text_projection"]
    return torch.cosine_similarity(image, text, dim=0)


def letterboxed(image: Tensor, side: int = 32) -> Tensor:
    """The published preparation: the longer side to `side`, black around, OpenAI's statistics."""
    height, width = image.shape[1:]
    scale = side / max(height, width)
    small = F.interpolate(image[None], (round(height * scale), round(width * scale)), mode="bicubic", antialias=True)
    square = torch.zeros(3, side, side)
    top, left = (side - small.shape[2]) // 2, (side - small.shape[3]) // 2
    square[:, top : top + small.shape[2], left : left + small.shape[3]] = small[0]
    return (square - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@pytest.mark.parametrize("layout", ["clip", "file"])
@pytest.mark.parametrize(("height", "width"), [(48, 48), (40, 70), (90, 33)])
def test_scores_are_those_of_the_published_scorer(layout: str, height: int, width: int, tiny: dict[str, Path]) -> None:
    reward, state = load(tiny, tiny[layout]), load_file(tiny["file"])
    images, batch = make_batch(height, width)
    scores = reward.score(images, batch)
    tokenizer = AutoTokenizer.from_pretrained(tiny["clip"])
    for p, prompt in enumerate(PROMPTS):
        tokens = torch.tensor(tokenizer(prompt)["input_ids"])
        for g in range(2):
            expected = by_hand(state, letterboxed(images[p, g]), tokens)
            assert scores.values[p, g] == pytest.approx(float(expected), abs=1e-5)
    assert scores.valid.all() and scores.values.std() > 1e-2


@pytest.mark.parametrize("own", [True, False])
def test_a_model_on_the_hub_has_its_own_processor_or_the_backbones(
    own: bool, tiny: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it lies in the cache once it is downloaded."""
    cached = tmp_path / "models--owner--hps"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    model = Path(shutil.copytree(tiny["clip"], cached / "snapshots" / ("0" * 40)))
    settings = json.loads((model / "preprocessor_config.json").read_text())
    (model / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.1, 0.2, 0.3]}))
    if not own:
        (model / "preprocessor_config.json").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = load(tiny, "owner/hps").score(*make_batch()).values
    assert torch.equal(found, load(tiny, tiny["clip"]).score(*make_batch()).values) is not own


def test_a_file_and_a_folder_hold_the_same(tiny: dict[str, Path]) -> None:
    state = AutoModel.from_pretrained(tiny["clip"]).state_dict()
    found = converted(load_file(tiny["file"]))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_a_compressed_file_is_computed_in_fp32(tiny: dict[str, Path], tmp_path: Path) -> None:
    """The published weights are compressed to half precision."""
    halves = {name: tensor.half() for name, tensor in load_file(tiny["file"]).items()}
    save_file(halves, tmp_path / "half.safetensors")
    reward = load(tiny, tmp_path / "half.safetensors")
    assert {parameter.dtype for parameter in reward._encoder._encode.__self__._model.parameters()} == {torch.float32}
    images, batch = make_batch()
    assert torch.allclose(
        reward.score(images, batch).values, load(tiny, tiny["file"]).score(images, batch).values, atol=1e-2
    )


def test_a_square_picture_of_the_encoders_size_is_left_as_it_is() -> None:
    images = make_batch(32, 32)[0][0]
    found = Letterbox(32, (0.0,) * 3, (1.0,) * 3)(images)
    assert torch.equal(found, images)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"visual.proj": None}, r"backbone's architecture in open_clip's names \(it lacks visual_projection\.weight\)"),
        ({"attn_mask": torch.zeros(2, 2)}, r"\(it has attn_mask\)"),
        ({"visual.positional_embedding": torch.zeros(7, 16)}, r"position_embedding\.weight is \[7, 16\], expected"),
        ({"transformer.resblocks.1.attn.in_proj_weight": torch.zeros(32, 16)}, r"k_proj\.weight is \[11, 16\], exp"),
        ({"transformer.resblocks.2.ln_1.bias": torch.zeros(16)}, r"\(it has text_model\.encoder\.layers\.2\."),
    ],
)
def test_other_tensors_are_refused(
    change: dict[str, Tensor | None], said: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    state = {name: tensor for name, tensor in (load_file(tiny["file"]) | change).items() if tensor is not None}
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(
        UserError, match=r"rewards\.prompt\.hpsv2\.model: .*other\.safetensors does not hold a CLIP.*" + said
    ):
        load(tiny, tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("HPS_v2.1_compressed.pt", r"is a pickle, which is never read; a few lines of python make a safetensors file"),
        ("nowhere.safetensors", r"nowhere\.safetensors is neither a file nor owner/name/file\.safetensors"),
        ("damaged.safetensors", r"is damaged, or no safetensors file"),
        ("nobody/nothing", r"nobody/nothing could not be loaded"),
    ],
)
def test_a_model_that_cannot_be_had(model: str, said: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "damaged.safetensors").write_bytes(b"\x00" * 64)
    path = tmp_path / model
    with pytest.raises(UserError, match=rf"rewards\.prompt\.hpsv2\.model: .*{said}"):
        load(tiny, path if path.exists() else Path(model))


def test_a_model_has_to_be_named() -> None:
    with pytest.raises(ValidationError, match="hpsv2.model: HPSv2 has no usual model, since its published weights are"):
        RewardConfig.model_validate({"kind": "hpsv2"})


def test_settings_of_hpsv2_are_for_it_alone() -> None:
    with pytest.raises(ValidationError, match="hpsv2.backbone: only for kind=hpsv2"):
        RewardConfig.model_validate({"kind": "clip_t", "hpsv2": {"backbone": "somewhere"}})
