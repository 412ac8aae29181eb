"""HPSv3 (arXiv 2508.03789), the paper's prompt reward: a Qwen2-VL that reads image and prompt, and a head on its
reward token.

Weights are the published `HPSv3.safetensors`; configuration, tokenizer and image processor come from the backbone's
folder. The instruction that the model was trained with is its data, not ours: it is read from the installed `hpsv3`
distribution, which is not imported, or from a file.
"""

import ast
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, Qwen2VLImageProcessorPil, Qwen2VLModel

from customized_grpo.data.images import to_pil
from customized_grpo.errors import UserError, first_line
from customized_grpo.io.connection import check_hub
from customized_grpo.io.hub import from_hub, resolve_file
from customized_grpo.io.tensors import mismatch, read_tensors
from customized_grpo.rewards.reward import Reward, Scores
from customized_grpo.runtime.qwen_vl import ImageTextProcessor
from customized_grpo.types import PromptBatch

WEIGHTS = "MizzenAI/HPSv3/HPSv3.safetensors"
REWARD_TOKEN = "<|Reward|>"
PIXELS = 256 * 28 * 28
"""Area that images are resized to, in multiples of 28 pixels a side."""
PLACE = "{text_prompt}"
SOURCE = "hpsv3/dataset/data_collator_qwen.py"
"""Where the distribution has its instruction, in two constants."""


class HPSv3(nn.Module):
    """The backbone and the head 3584 -> 1024 -> 16 -> 2, which gives the mean and the spread of the score."""

    def __init__(self, backbone: Qwen2VLModel, width: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.rm_head = nn.Sequential(
            nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
        ).float()

    def forward(self, inputs: dict[str, Tensor], reward_token: int, *, sequential: bool) -> Tensor:
        """Return the mean score [B] of `inputs`, each with one `reward_token`; the head runs in fp32."""
        given = dict(inputs)
        if sequential:
            length = given["input_ids"].shape[1]
            places = torch.arange(length, device=given["input_ids"].device)
            given["position_ids"] = places.expand(3, len(given["input_ids"]), length)
        hidden = self.backbone(**given, use_cache=False).last_hidden_state
        at = given["input_ids"] == reward_token
        logits: Tensor = self.rm_head(hidden[at].float())
        return logits[:, 0]


class HPSv3Reward(Reward):
    """The score of an image for its prompt, higher is better: about 0 to 15, unbounded."""

    def __init__(
        self,
        model: HPSv3,
        processor: Any,
        instruction: str,
        *,
        sequential: bool,
        micro_batch: int,
        device: torch.device,
    ) -> None:
        """Wrap `model`; `instruction` has `PLACE` for the prompt, and the reward token once.

        `sequential`: positions are 0, 1, 2, ... as the published scorer feeds them, not Qwen2-VL's own.
        """
        self._model, self._processor, self._instruction = model.eval().to(device), processor, instruction
        self._sequential, self._micro_batch, self._device = sequential, micro_batch, device
        self._token: int = processor.tokenizer.convert_tokens_to_ids(REWARD_TOKEN)

    @torch.no_grad()
    def score(self, images: Tensor, batch: PromptBatch) -> Scores:
        """See `Reward.score`. The images of a group are of one size, so its texts are of one length: none is padded."""
        groups = [
            torch.cat([self._scores(part, prompt) for part in group.split(self._micro_batch)])
            for group, prompt in zip(images, batch.prompts, strict=True)
        ]
        values = torch.stack(groups).float()
        return Scores(torch.where(values.isfinite(), values, 0.0), values.isfinite())

    def _scores(self, images: Tensor, prompt: str) -> Tensor:
        content = [{"type": "image"}, {"type": "text", "text": self._instruction.replace(PLACE, prompt)}]
        text = self._processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        inputs = self._processor(
            text=[text] * len(images), images=[to_pil(image) for image in images], return_tensors="pt"
        ).to(self._device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self._model.backbone.dtype)
        if self._sequential:
            inputs.pop("mm_token_type_ids", None)
        return self._model(dict(inputs), self._token, sequential=self._sequential)


def load_hpsv3(
    weights: str | None, backbone: str, instruction: Path | None, *, field: str, sequential: bool, micro_batch: int,
    device: torch.device, bf16: bool,
) -> HPSv3Reward:  # fmt: skip
    """Return the reward, whose settings stand at the configuration's `field` (rewards.prompt.hpsv3).

    `weights`: a file, or owner/name/file on the hub; `backbone`: a folder or hub id; `bf16`: compute in it, all but the
    head.

    Raises `UserError` where a part cannot be had, or its tensors are not those of HPSv3.
    """
    text = read_instruction(instruction, f"{field}.instruction")
    path = resolve_file(weights or WEIGHTS, f"{field}.model")
    if not Path(backbone).exists():
        check_hub()
    try:
        with from_hub():
            tokenizer = AutoTokenizer.from_pretrained(backbone, trust_remote_code=False)
            pictures = Qwen2VLImageProcessorPil.from_pretrained(backbone, min_pixels=PIXELS, max_pixels=PIXELS)
            config = AutoConfig.from_pretrained(backbone, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{field}.backbone: {backbone} could not be loaded ({first_line(error)}); name a folder, or a hub id "
            "that can be reached"
        ) from error
    tokenizer.add_tokens([REWARD_TOKEN], special_tokens=True)
    state = renamed(read_tensors(path, f"{field}.model"))
    config.text_config.vocab_size = len(state.get("backbone.language_model.embed_tokens.weight", ()))
    # Tables of rotary frequencies are made, weights only outlined.
    with init_empty_weights(include_buffers=False):
        model = HPSv3(Qwen2VLModel(config), config.text_config.hidden_size)
    _check_names(path, state, model.state_dict(), len(tokenizer), field)
    dtype = torch.bfloat16 if bf16 else torch.float32
    cast = {name: tensor.to(torch.float32 if "rm_head" in name else dtype) for name, tensor in state.items()}
    model.load_state_dict(cast, assign=True)
    processor = ImageTextProcessor(pictures, tokenizer)
    return HPSv3Reward(model, processor, text, sequential=sequential, micro_batch=micro_batch, device=device)


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the published file's tensors, from an older transformers, for `HPSv3`; the unused `lm_head` goes."""
    prefixes = {"visual.": "backbone.visual.", "model.": "backbone.language_model.", "rm_head.": "rm_head."}
    found = {}
    for name, tensor in state.items():
        prefix = next((old for old in prefixes if name.startswith(old)), None)
        if prefix is not None:
            found[prefixes[prefix] + name.removeprefix(prefix)] = tensor
        elif not name.startswith("lm_head."):
            found[name] = tensor
    return found


def read_instruction(path: Path | None, field: str) -> str:
    """Return the instruction and the line with the reward token, from the file that `field` names, or else the
    installed `hpsv3` distribution."""
    if path is not None:
        if not path.is_file():
            raise UserError(f"{field}: {path} is no file")
        text = path.read_text(encoding="utf-8-sig")
    else:
        text = _published_instruction(field)
    for part in (PLACE, REWARD_TOKEN):
        if text.count(part) != 1:
            raise UserError(f"{field}: {path or SOURCE} has {part} {text.count(part)} times, expected once")
    return text


def _published_instruction(field: str) -> str:
    try:
        files = metadata.distribution("hpsv3").files or []
    except metadata.PackageNotFoundError as error:
        raise UserError(
            f"{field}: HPSv3's own instruction is wanted; `pip install --no-deps hpsv3` brings it "
            "(its code is not run), or name a file that has it"
        ) from error
    source = next((file for file in files if str(file).endswith(SOURCE)), None)
    if source is None:
        raise UserError(f"{field}: the installed hpsv3 has no {SOURCE}; name a file with the text")
    tree = ast.parse(Path(str(source.locate())).read_text(encoding="utf-8"))
    texts = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    return "".join(str(texts.get(name, "")) for name in ("INSTRUCTION", "prompt_with_special_token"))


def _check_names(
    path: Path, state: dict[str, Tensor], expected: dict[str, Tensor], vocabulary: int, field: str
) -> None:
    wrong = mismatch(state, expected)
    if wrong:
        raise UserError(
            f"{field}.model: {path} does not hold HPSv3 on this backbone ({wrong}); name HPSv3.safetensors, "
            f"and Qwen2-VL-7B-Instruct in {field}.backbone"
        )
    rows = len(state["backbone.language_model.embed_tokens.weight"])
    if rows < vocabulary:
        raise UserError(
            f"{field}.model: {path} has {rows} rows of token embeddings, and the backbone's tokenizer with "
            f"{REWARD_TOKEN} {vocabulary} tokens; name the backbone that it was trained on"
        )
