"""Pretrained encoders as rewards: DINO, CLIP, SigLIP and PickScore, through transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, BaseImageProcessor

from customized_grpo.errors import UserError, first_line
from customized_grpo.rewards import Reward
from customized_grpo.rewards.pictures import Preprocessing
from customized_grpo.rewards.similarity import IdentitySimilarity, PictureEncoder, PromptSimilarity, pooled

MODELS = {
    "dino": "facebook/dinov2-base",
    "clip_i": "openai/clip-vit-base-patch32",
    "clip_t": "openai/clip-vit-base-patch32",
    "siglip": "google/siglip-base-patch16-224",
    "pickscore": "yuvalkirstain/PickScore_v1",
}
"""What a reward uses where the configuration names no model."""
PROCESSORS = {"pickscore": "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"}
"""Whose tokenizer and image processor a model takes that is published without any."""
TYPES = {
    "dino": ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit"),
    "clip_i": ("clip",),
    "clip_t": ("clip",),
    "siglip": ("siglip",),
    "pickscore": ("clip",),
}
"""Model types, as in a checkpoint's config.json, that a reward can read."""
IDENTITY = ("dino", "clip_i")
"""Those that compare pictures with references; the others compare them with prompts."""


class Checkpoint:
    """A pretrained encoder, from a folder or the hub."""

    def __init__(self, field: str, kind: str, name: str | None, device: torch.device, micro_batch: int) -> None:
        """`field`: the configuration field that `name` is from. Raises `UserError` where the model cannot be had or is
        of another type."""
        self._field, self._kind, self._device, self._micro_batch = field, kind, device, micro_batch
        self._name = name or MODELS[kind]
        complete = name is not None and (Path(name) / "preprocessor_config.json").is_file()
        self._processor = self._name if complete else PROCESSORS.get(kind, self._name)
        found = self._load(AutoConfig, self._name).model_type
        if found not in TYPES[kind]:
            raise UserError(f"{field}: {self._name} is of type {found}, but {kind} reads {', '.join(TYPES[kind])}")
        self._model = self._load(AutoModel, self._name).requires_grad_(False).eval().to(device)

    def reward(self, *, segmented: bool, background: float, several: str) -> Reward:
        """The reward; what is given is of identity: see `IdentitySimilarity`."""
        if self._kind in IDENTITY:
            return IdentitySimilarity(self.encoder(), segmented=segmented, background=background, several=several)
        return self.to_prompt()

    def encoder(self, preprocess: Preprocessing | None = None) -> PictureEncoder:
        """Features of pictures; `preprocess` takes the place of the checkpoint's own image processor.

        Raises `UserError` where the model takes pictures of another size.
        """
        side = getattr(self._model.config, "image_size", None)
        if preprocess is not None and self._model.config.model_type == "vit" and preprocess.crop != (side, side):
            raise UserError(f"{self._field}: {self._name} takes {side}x{side} pixels, expected {preprocess.crop}")
        return PictureEncoder(
            self._class_token if self._kind == "dino" else self._projected,
            preprocess or self._preprocessing(),
            self._device,
            self._micro_batch,
        )

    def _preprocessing(self) -> Preprocessing:
        if self._model.config.model_type == "dinov3_vit":
            # Its image processor needs torchvision, but its settings are all in its file.
            settings, _ = BaseImageProcessor.get_image_processor_dict(self._processor)
        else:
            settings = self._load(AutoImageProcessor, self._processor).to_dict()
        return Preprocessing.of(settings)

    def to_prompt(self) -> PromptSimilarity:
        """Cosine of pictures with prompts, for the kinds that read prompts."""
        tokenizer = self._load(AutoTokenizer, self._processor)
        # SigLIP was trained on texts padded to their full length, without a mask.
        padding = "max_length" if self._kind == "siglip" else True

        def read(prompts: Sequence[str]) -> Tensor:
            tokens = tokenizer(list(prompts), padding=padding, truncation=True, return_tensors="pt").to(self._device)
            names = {"input_ids"} if self._kind == "siglip" else {"input_ids", "attention_mask"}
            return pooled(self._model.get_text_features(**{name: tokens[name] for name in names}))

        return PromptSimilarity(self.encoder(), read)

    def _class_token(self, pixels: Tensor) -> Tensor:
        hidden: Tensor = self._model(pixel_values=pixels).last_hidden_state
        return hidden[:, 0]

    def _projected(self, pixels: Tensor) -> Tensor:
        return pooled(self._model.get_image_features(pixel_values=pixels))

    def _load(self, loader: Any, name: str) -> Any:
        try:
            return loader.from_pretrained(name, **({"use_safetensors": True} if loader is AutoModel else {}))
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise UserError(
                f"{self._field}: {name} could not be loaded ({first_line(error)}); name a folder, or a hub id that can "
                "be reached"
            ) from error
