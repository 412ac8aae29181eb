"""HPSv3 on a tiny backbone of the true class, its weights in the names of the published file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from named_rewards import load_named
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

from customized_grpo.config.rewards import RewardConfig
from customized_grpo.errors import UserError
from customized_grpo.rewards import hpsv3 as module
from customized_grpo.rewards.hpsv3 import PLACE, REWARD_TOKEN, HPSv3Reward, read_instruction
from customized_grpo.testing.tiny_rewards import save_tiny_hpsv3, save_tiny_reward
from customized_grpo.types import PromptBatch

CPU = torch.device("cpu")
TEXT = f"Rate it.\nTextual prompt - {PLACE}\n\nThe rating: {REWARD_TOKEN}\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("hpsv3")
    weights, backbone = save_tiny_hpsv3(folder)
    (folder / "instruction.txt").write_text(TEXT)
    dino = save_tiny_reward("dino", folder / "dino")
    return {"weights": weights, "backbone": backbone, "instruction": folder / "instruction.txt", "dino": dino}


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ninth of the published area: the tiny model is no faster at reading pictures than a large one."""
    monkeypatch.setattr(module, "PIXELS", 9 * 28 * 28)


def load(tiny: dict[str, Path], **more: Any) -> HPSv3Reward:
    settings: dict[str, Any] = {
        "prompt": "hpsv3", "identity": "dino", "dino": {"model": str(tiny["dino"])},
        "hpsv3": {
            "model": str(tiny["weights"]), "backbone": str(tiny["backbone"]), "instruction": str(tiny["instruction"]),
            **more,
        },
    }  # fmt: skip
    reward = load_named(settings)["prompt"]
    assert isinstance(reward, HPSv3Reward)
    return reward


def make_batch(groups: int = 2, size: int = 2) -> tuple[Tensor, PromptBatch]:
    images = torch.rand(groups, size, 3, 60, 90, generator=torch.Generator().manual_seed(0))
    prompts = ["a cat", "a much longer prompt of a dog"][:groups]
    return images, PromptBatch(prompts, [[images[p, 0]] for p in range(groups)], None)


def by_hand(tiny: dict[str, Path], reward: HPSv3Reward, image: Tensor, prompt: str, *, sequential: bool) -> Tensor:
    """The published scorer, written out on transformers' own whole model: mu at the reward token."""
    state = load_file(tiny["weights"])
    config = AutoConfig.from_pretrained(tiny["backbone"])
    model = Qwen2VLForConditionalGeneration(config).eval()
    names = {"visual.": "model.visual.", "model.": "model.language_model."}
    backbone = {
        new + k.removeprefix(old): v for k, v in state.items() for old, new in names.items() if k.startswith(old)
    }
    model.load_state_dict(backbone | {"lm_head.weight": state["lm_head.weight"]})
    pictures = Qwen2VLImageProcessorPil.from_pretrained(tiny["backbone"], min_pixels=7056, max_pixels=7056)
    pixels = pictures(images=[module.to_pil(image)], return_tensors="pt")
    count = int(pixels["image_grid_thw"].prod()) // 4
    text = TEXT.replace(PLACE, prompt)
    whole = f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>{text}<|im_end|>\n"
    ids = reward._processor.tokenizer(whole + "<|im_start|>assistant\n", return_tensors="pt")["input_ids"]
    more: dict[str, Any] = {"mm_token_type_ids": (ids == 262).int()}
    if sequential:
        more = {"position_ids": torch.arange(ids.shape[1]).view(1, 1, -1).expand(3, 1, -1)}
    with torch.no_grad():
        hidden = model(input_ids=ids, **pixels, **more, output_hidden_states=True).hidden_states[-1]
        x = hidden[0, (ids[0] == reward._token).nonzero()[0, 0]]
        for layer, active in ((0, True), (3, True), (5, False)):
            x = state[f"rm_head.{layer}.weight"] @ x + state[f"rm_head.{layer}.bias"]
            x = x.relu() if active else x
    return x[0]


@pytest.mark.parametrize("positions", ["sequential", "mrope"])
def test_scores_are_those_of_the_published_scorer(positions: str, tiny: dict[str, Path]) -> None:
    reward = load(tiny, positions=positions)
    images, batch = make_batch()
    scores = reward.score(images, batch)
    for p, prompt in enumerate(batch.prompts):
        for g in range(2):
            expected = by_hand(tiny, reward, images[p, g], prompt, sequential=positions == "sequential")
            assert scores.values[p, g] == pytest.approx(float(expected), abs=1e-5)
    assert scores.valid.all() and scores.values.std() > 1e-4


def test_positions_make_a_difference(tiny: dict[str, Path]) -> None:
    images, batch = make_batch()
    sequential, mrope = (load(tiny, positions=kind).score(images, batch).values for kind in ("sequential", "mrope"))
    assert (sequential - mrope).abs().max() > 1e-6


def test_micro_batches_change_nothing(tiny: dict[str, Path]) -> None:
    reward = load(tiny)
    images, batch = make_batch(2, 3)
    whole = reward.score(images, batch).values
    reward._micro_batch = 1
    assert torch.allclose(reward.score(images, batch).values, whole, atol=1e-5)


def test_what_is_not_finite_is_not_valid(tiny: dict[str, Path]) -> None:
    reward = load(tiny)
    with torch.no_grad():
        reward._model.rm_head[5].bias.fill_(torch.inf)
    scores = reward.score(*make_batch())
    assert not scores.valid.any() and scores.values.isfinite().all()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rm_head.5.bias": None}, r"does not hold HPSv3 on this backbone \(it lacks rm_head\.5\.bias\)"),
        ({"extra.weight": torch.zeros(1)}, r"\(it has extra\.weight\)"),
        ({"rm_head.3.bias": torch.zeros(8)}, r"\(rm_head\.3\.bias is \[8\], expected \[16\]\)"),
        ({"model.embed_tokens.weight": torch.zeros(264, 32)}, "264 rows of token embeddings, and the backbone's"),
    ],
)
def test_other_tensors_are_refused(
    change: dict[str, Tensor | None], said: str, tiny: dict[str, Path], tmp_path: Path
) -> None:
    state = {name: tensor for name, tensor in (load_file(tiny["weights"]) | change).items() if tensor is not None}
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=said):
        load(tiny | {"weights": tmp_path / "other.safetensors"})


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("weights", r"rewards\.prompt\.hpsv3\.model: .* is neither a file nor owner/name/file\.safetensors"),
        ("backbone", r"rewards\.prompt\.hpsv3\.backbone: .* could not be loaded"),
        ("instruction", r"rewards\.prompt\.hpsv3\.instruction: .* is no file"),
    ],
)
def test_parts_that_cannot_be_had(part: str, said: str, tiny: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        load(tiny | {part: tmp_path / "nowhere"})


def test_an_instruction_without_its_places(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(f"no place for a prompt {REWARD_TOKEN}")
    with pytest.raises(UserError, match=r"has \{text_prompt\} 0 times, expected once"):
        read_instruction(tmp_path / "text", "rewards.prompt.hpsv3.instruction")


def test_a_byte_order_mark_is_no_part_of_the_instruction(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(f"\ufeffJudge. {PLACE}\r\n{REWARD_TOKEN}".encode())
    assert read_instruction(tmp_path / "text", "rewards.prompt.hpsv3.instruction") == f"Judge. {PLACE}\n{REWARD_TOKEN}"


def test_the_published_instruction_is_read_without_being_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "hpsv3" / "dataset" / "data_collator_qwen.py"
    source.parent.mkdir(parents=True)
    source.write_text(
        "raise SystemExit('it was run')\nimport nothing\n"
        f'INSTRUCTION = """\nJudge. {PLACE}\n"""\nprompt_with_special_token = """{REWARD_TOKEN} END"""\n'
    )
    about = tmp_path / "hpsv3-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: hpsv3\nVersion: 1.0\n")
    (about / "RECORD").write_text("hpsv3/dataset/data_collator_qwen.py,,\nhpsv3-1.0.dist-info/METADATA,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert read_instruction(None, "rewards.prompt.hpsv3.instruction") == f"\nJudge. {PLACE}\n{REWARD_TOKEN} END"


def test_without_the_distribution() -> None:
    with pytest.raises(UserError, match=r"`pip install --no-deps hpsv3` brings it"):
        read_instruction(None, "rewards.prompt.hpsv3.instruction")


def test_settings_of_hpsv3_are_for_it_alone() -> None:
    with pytest.raises(ValidationError, match="hpsv3.positions: only for kind=hpsv3 .found kind=clip_t"):
        RewardConfig.model_validate({"kind": "clip_t", "hpsv3": {"positions": "mrope"}})
