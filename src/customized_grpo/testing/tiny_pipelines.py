"""Tiny random generators of the true classes, saved in diffusers' own layout: what `from_pretrained` takes, without a
network."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from customized_grpo.io.files import writing
from customized_grpo.runtime.qwen_vl import ImageTextProcessor

BYTES = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]
BYTES += [chr(256 + index) for index in range(256 - len(BYTES))]
"""The alphabet of byte-level BPE."""
HEADS = 4
"""Of a transformer, with 16 channels each: 4-bit weights share a scale in rows of 64, and bitsandbytes restores others
wrongly on CPUs with AVX-512."""
QWEN_SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL_SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[INST]{% for part in message['content'] %}{{ part['text'] }}"
    "{% endfor %}[/INST]{% endfor %}"
)


def clip_tokenizer() -> CLIPTokenizer:
    symbols = [*BYTES, *(byte + "</w>" for byte in BYTES), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({symbol: index for index, symbol in enumerate(symbols)}, [], model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", "\u2581", *map(chr, range(33, 127))]
    scores = [(piece, 0.0 if index < 3 else -2.0) for index, piece in enumerate(pieces)]
    return T5Tokenizer(scores, extra_ids=0, additional_special_tokens=None, model_max_length=512)


def qwen_tokenizer() -> Qwen2Tokenizer:
    vocabulary = {symbol: index for index, symbol in enumerate([*BYTES, *QWEN_SPECIAL])}
    return Qwen2Tokenizer(
        vocabulary, [], additional_special_tokens=QWEN_SPECIAL[1:], chat_template=QWEN_TEMPLATE, model_max_length=2048
    )


def scheduler(**settings: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **settings)


def clip_text() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=520, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            projection_dim=16, bos_token_id=512, eos_token_id=513, pad_token_id=513,
        )
    )  # fmt: skip


def t5_text() -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=98, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))


def flux_transformer(*, guidance_embeds: bool = True) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=HEADS,
        joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=guidance_embeds, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def flux_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4), norm_num_groups=2, latent_channels=4, shift_factor=0.1159,
        scaling_factor=0.3611, use_quant_conv=False, use_post_quant_conv=False, sample_size=32,
    )  # fmt: skip


def flux1(pipeline: type) -> Callable[[], FluxPipeline]:
    def make() -> FluxPipeline:
        return pipeline(
            scheduler=scheduler(), vae=flux_vae(), text_encoder=clip_text(), tokenizer=clip_tokenizer(),
            text_encoder_2=t5_text(), tokenizer_2=t5_tokenizer(), transformer=flux_transformer(),
        )  # fmt: skip

    return make


def flux2_transformer(text_width: int, *, guidance_embeds: bool) -> Flux2Transformer2DModel:
    return Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=HEADS,
        joint_attention_dim=text_width, timestep_guidance_channels=16, guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip


def flux2_vae() -> Any:
    vae: Any = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4), norm_num_groups=2, latent_channels=4, sample_size=32,
    )  # fmt: skip
    vae.bn.running_mean.normal_(0, 0.3)
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def flux2_klein(*, distilled: bool = False) -> Flux2KleinPipeline:
    config = Qwen3Config(
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=28, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, pad_token_id=256, bos_token_id=None, eos_token_id=258,
    )  # fmt: skip
    return Flux2KleinPipeline(
        scheduler=scheduler(), vae=flux2_vae(), text_encoder=Qwen3ForCausalLM(config), tokenizer=qwen_tokenizer(),
        transformer=flux2_transformer(48, guidance_embeds=False), is_distilled=distilled,
    )  # fmt: skip


def flux2() -> Flux2Pipeline:
    """Build FLUX.2 [dev]: its language model has 31 layers, since the pipeline reads the states after the 30th."""
    text = {
        "model_type": "mistral", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 31, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    encoder = Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=vision, image_token_index=262)
    )
    return Flux2Pipeline(
        scheduler=scheduler(), vae=flux2_vae(), text_encoder=encoder, tokenizer=mistral_tokenizer(),
        transformer=flux2_transformer(48, guidance_embeds=True),
    )  # fmt: skip


def mistral_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(BPE({symbol: index for index, symbol in enumerate([*BYTES, *MISTRAL_SPECIAL])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=MISTRAL_SPECIAL[4:], padding_side="left", chat_template=MISTRAL_TEMPLATE,
    )  # fmt: skip


def qwen_vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage(
        base_dim=12, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.7, 1.1, 0.9],
    )  # fmt: skip


def qwen_image_edit_plus() -> QwenImageEditPlusPipeline:
    """Build Qwen-Image-Edit 2509 and later, without its processor, which `save_tiny` adds."""
    tokenizer = qwen_tokenizer()
    text = {
        "model_type": "qwen2_5_vl_text", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
        "rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e6},
        "initializer_range": 0.3,  # usual weights hardly look where a token is
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 16,
        "window_size": 112, "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, vision_start_token_id=259, vision_end_token_id=260,
        image_token_id=262, video_token_id=263,
    )  # fmt: skip
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=HEADS,
        joint_attention_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return QwenImageEditPlusPipeline(
        scheduler=scheduler(base_shift=0.5, max_shift=0.9, shift_terminal=0.02), vae=qwen_vae(),
        text_encoder=Qwen2_5_VLForConditionalGeneration(config), tokenizer=tokenizer, processor=None,
        transformer=transformer,
    )  # fmt: skip


MAKERS: dict[str, Callable[[], Any]] = {
    "flux1-kontext": flux1(FluxKontextPipeline),
    "uno": flux1(FluxPipeline),
    "flux2-klein": flux2_klein,
    "flux2": flux2,
    "qwen-image-edit-plus": qwen_image_edit_plus,
}


def save_tiny(kind: str, folder: Path, seed: int = 0) -> Path:
    """Build the tiny generator `kind` and save it into `folder`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = MAKERS[kind]()
        # Random linear layers of these widths leave the transformer almost silent, and parity easy.
        for parameter in pipeline.transformer.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    with writing(folder):
        pipeline.save_pretrained(folder)
        if kind == "qwen-image-edit-plus":
            # Up to 3 x 3 tokens for a picture: of one, its row and column would not show.
            images = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=100 * 100)
            ImageTextProcessor(images, pipeline.tokenizer).save_pretrained(folder / "processor")
            index = json.loads((folder / "model_index.json").read_text())
            index["processor"] = ["transformers", "Qwen2VLProcessor"]
            (folder / "model_index.json").write_text(json.dumps(index))
    return folder
