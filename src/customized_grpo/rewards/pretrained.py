"""Pretrained encoders as rewards: DINO, CLIP, SigLIP, PickScore and HPSv2, through transformers."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer, BaseImageProcessor
from transformers.utils.hub import cached_file

from customized_grpo.errors import UserError, first_line
from customized_grpo.io.connection import check_hub
from customized_grpo.io.hub import check_shards, forbid_pickles, from_hub, resolve_file
from customized_grpo.rewards.open_clip import load_open_clip
from customized_grpo.rewards.preprocessing import Letterbox, Preprocessing
from customized_grpo.rewards.similarity import IdentitySimilarity, PictureEncoder, PromptSimilarity, pooled
from customized_grpo.types import PromptLengths

MODELS = {
    "dino": "facebook/dinov2-base",
    "clip_i": "openai/clip-vit-base-patch32",
    "clip_t": "openai/clip-vit-base-patch32",
    "siglip": "google/siglip-base-patch16-224",
    "pickscore": "yuvalkirstain/PickScore_v1",
}
"""What a reward uses where the configuration names no model."""
TYPES = {
    "dino": ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit"),
    "clip_i": ("clip",),
    "clip_t": ("clip",),
    "siglip": ("siglip",),
    "pickscore": ("clip",),
    "hpsv2": ("clip",),
}
"""Model types, as in a checkpoint's config.json, that a reward can read."""
PICKLES = (".pt", ".pth", ".bin", ".ckpt")


class PretrainedEncoder:
    """A pretrained encoder, from a folder or the hub."""

    def __init__(
        self,
        field: str,
        kind: str,
        name: str | None,
        backbone: str | None,
        device: torch.device,
        *,
        micro_batch: int,
        bf16: bool,
    ) -> None:
        """Load the model `name`, the value of the configuration `field`.

        `backbone`: the model whose tokenizer and image processor are used if `name` has none of its own. Raises
        `UserError` if the model cannot be loaded or has another type.
        """
        self._field, self._kind, self._device, self._micro_batch = field, kind, device, micro_batch
        self._name = name or MODELS[kind]
        if kind == "hpsv2" and self._name.endswith(PICKLES):
            raise UserError(
                f"{field}: {self._name} is a pickle, which is never read; a few lines of python make a safetensors "
                "file of it: docs/rewards.md, HPSv2"
            )
        file = kind == "hpsv2" and self._name.endswith(".safetensors")
        self._processor = self._name
        if backbone is not None and (file or not _has_processor(self._name)):
            self._processor = backbone
        config = self._load(AutoConfig, self._processor if file else self._name)
        if config.model_type not in TYPES[kind]:
            reads = ", ".join(TYPES[kind])
            raise UserError(f"{field}: {self._name} is of type {config.model_type}, but {kind} reads {reads}")
        if file:
            model = load_open_clip(resolve_file(self._name, field), config, field)
        else:
            model = self._load(AutoModel, self._name)
        self._dtype = torch.bfloat16 if bf16 else torch.float32
        self._model: Any = model.requires_grad_(False).eval().to(device, self._dtype)

    def to_identity(self, *, segmented: bool, background: float, several: str) -> IdentitySimilarity:
        """Return the cosine of images with references; see `IdentitySimilarity`."""
        return IdentitySimilarity(self.own_encoder, segmented=segmented, background=background, several=several)

    @cached_property
    def own_encoder(self) -> PictureEncoder:
        """Return the encoder with the model's own image processor, shared with the references it keeps."""
        return self.encoder()

    def encoder(self, preprocess: Preprocessing | None = None, half: str = "down") -> PictureEncoder:
        """Return the function from pictures to features.

        `preprocess` replaces the model's own image processor, `half` its rounding of odd crops (see `Preprocessing`).
        Raises `UserError` if the model takes pictures of another size.
        """
        side = getattr(self._model.config, "image_size", None)
        if preprocess is not None and self._model.config.model_type == "vit" and preprocess.crop != (side, side):
            raise UserError(f"{self._field}: {self._name} takes {side}x{side} pixels, expected {preprocess.crop}")
        return PictureEncoder(
            self._class_token if self._kind == "dino" else self._projected,
            preprocess or self._preprocessing(half),
            self._device,
            self._micro_batch,
        )

    def _preprocessing(self, half: str) -> Callable[[Tensor], Tensor]:
        if self._model.config.model_type == "dinov3_vit":
            # Its image processor needs torchvision, but its settings are all in its file.
            settings, _ = BaseImageProcessor.get_image_processor_dict(self._processor)
        else:
            settings = self._load(AutoImageProcessor, self._processor).to_dict()
        if self._kind == "hpsv2":
            side = self._model.config.vision_config.image_size
            return Letterbox(side, tuple(settings["image_mean"]), tuple(settings["image_std"]))
        return replace(Preprocessing.of(settings, f"{self._field}: {self._processor}"), half=half)

    def to_prompt(self, half: str = "down") -> PromptSimilarity:
        """Return the cosine of images with prompts, for kinds that read prompts; `half`: see `encoder`."""
        tokenizer = self._load(AutoTokenizer, self._processor)
        # SigLIP was trained on texts padded to their full length, without a mask.
        padding = "max_length" if self._kind == "siglip" else True
        most = min(tokenizer.model_max_length, self._model.config.text_config.max_position_embeddings)

        def read(prompts: Sequence[str]) -> Tensor:
            tokens = tokenizer(
                list(prompts), padding=padding, truncation=True, max_length=most, return_tensors="pt"
            ).to(self._device)
            names = {"input_ids"} if self._kind == "siglip" else {"input_ids", "attention_mask"}
            return pooled(self._model.get_text_features(**{name: tokens[name] for name in names}))

        def measure(prompts: Sequence[str]) -> PromptLengths:
            return PromptLengths([len(each) for each in tokenizer(list(prompts), verbose=False)["input_ids"]], most)

        return PromptSimilarity(self.own_encoder if half == "down" else self.encoder(half=half), read, measure)

    def _class_token(self, pixels: Tensor) -> Tensor:
        hidden: Tensor = self._model(pixel_values=pixels.to(self._dtype)).last_hidden_state
        return hidden[:, 0]

    def _projected(self, pixels: Tensor) -> Tensor:
        return pooled(self._model.get_image_features(pixel_values=pixels.to(self._dtype)))

    def _load(self, loader: Any, name: str) -> Any:
        check_shards(Path(name), self._field)
        _check_way(name)
        more = {"use_safetensors": True} if loader is AutoModel else {}
        try:
            with from_hub(), forbid_pickles():
                return loader.from_pretrained(name, trust_remote_code=False, **more)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
            raise UserError(
                f"{self._field}: {name} could not be loaded ({first_line(error)}); name a folder, or a hub id that can "
                "be reached"
            ) from error


def _check_way(name: str) -> None:
    """Raise `UserError` where a model has to come from the hub, and the way there cannot be used."""
    if not Path(name).exists():
        check_hub()


def _has_processor(name: str) -> bool:
    """Return whether the model in a folder, or on the hub, has an image processor of its own.

    If the model is in neither place, loading it raises the error.
    """
    _check_way(name)
    try:
        with from_hub():
            return (
                cached_file(name, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False) is not None
            )
    except OSError:
        return False
