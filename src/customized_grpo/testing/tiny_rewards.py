"""Tiny random reward models of the true classes, saved in their own layout: what `from_pretrained` takes."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Qwen2VLConfig,
    Qwen2VLImageProcessorPil,
    Qwen2VLModel,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from customized_grpo.io.files import save_tensors, writing
from customized_grpo.rewards.hpsv3 import HPSv3
from customized_grpo.testing.tiny_pipelines import clip_tokenizer, qwen_tokenizer, t5_tokenizer

IMAGENET: dict[str, Any] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
KINDS = ("dino", "dinov3", "vit", "vits16", "clip", "siglip")
HPSV3_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_LAYERS: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_tiny_reward(kind: str, folder: Path, seed: int = 0) -> Path:
    """Build the tiny model `kind`, one of KINDS, and save it with its processors into `folder`."""
    with torch.random.fork_rng(devices=[]), writing(folder):
        torch.manual_seed(seed)
        if kind == "dino":
            Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2)).save_pretrained(
                folder
            )
            BitImageProcessorPil(
                size={"shortest_edge": 256}, crop_size={"height": 224, "width": 224}, resample=3, **IMAGENET
            ).save_pretrained(folder)
        elif kind == "dinov3":
            DINOv3ViTModel(DINOv3ViTConfig(patch_size=16, **_LAYERS)).save_pretrained(folder)
            settings = {"image_processor_type": "DINOv3ViTImageProcessorFast", "do_resize": True, "resample": 2}
            settings |= {"size": {"height": 64, "width": 64}, "do_normalize": True, "do_rescale": True, **IMAGENET}
            (folder / "preprocessor_config.json").write_text(json.dumps(settings))
        elif kind in ("vit", "vits16"):
            side = 64 if kind == "vit" else 224
            ViTModel(ViTConfig(image_size=side, patch_size=16, **_LAYERS)).save_pretrained(folder)
            ViTImageProcessorPil(size={"height": side, "width": side}, resample=2).save_pretrained(folder)
        elif kind == "clip":
            text = {**_LAYERS, "vocab_size": 520, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513}
            vision = {**_LAYERS, "image_size": 32, "patch_size": 16}
            CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
            CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
                folder
            )
            clip_tokenizer().save_pretrained(folder)
        else:
            text = {**_LAYERS, "vocab_size": 98, "max_position_embeddings": 64, "projection_size": 16}
            vision = {**_LAYERS, "image_size": 32, "patch_size": 16}
            SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
            SiglipImageProcessorPil(size={"height": 32, "width": 32}, resample=3).save_pretrained(folder)
            tokenizer = t5_tokenizer()
            tokenizer.model_max_length = 64
            tokenizer.save_pretrained(folder)
    return folder


def save_tiny_hpsv3(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Save a tiny HPSv3: its weights in the published file's names, and the folder of its backbone."""
    backbone = folder / "backbone"
    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = HPSV3_TEMPLATE
    with writing(folder):
        tokenizer.save_pretrained(backbone)
        Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=28 * 28 * 1280).save_pretrained(backbone)
    text = {
        "model_type": "qwen2_vl_text", **_LAYERS, "hidden_size": 32, "num_key_value_heads": 2, "vocab_size": 300,
        "rope_parameters": {"mrope_section": [2, 3, 3], "rope_type": "default", "rope_theta": 1e6},
    }  # fmt: skip
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, vision_start_token_id=259, vision_end_token_id=260,
        image_token_id=262, video_token_id=263,
    )  # fmt: skip
    with writing(folder):
        config.save_pretrained(backbone)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HPSv3(Qwen2VLModel(config), 32)
    published = {"backbone.visual.": "visual.", "backbone.language_model.": "model.", "rm_head.": "rm_head."}
    state = {
        next(
            new + name.removeprefix(old) for old, new in published.items() if name.startswith(old)
        ): tensor.contiguous()
        for name, tensor in model.state_dict().items()
    }
    save_tensors(state | {"lm_head.weight": torch.zeros(300, 32)}, folder / "HPSv3.safetensors")
    return folder / "HPSv3.safetensors", backbone
