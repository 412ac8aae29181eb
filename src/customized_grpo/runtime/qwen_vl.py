"""Qwen2-VL's processor without torchvision."""

from typing import Any

from transformers import ProcessorMixin, Qwen2VLProcessor


class ImageTextProcessor(Qwen2VLProcessor):
    """Qwen2-VL's processor for pictures and text; that for video, which the original wants too, needs torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str | None = None) -> None:
        self.image_token = "<|image_pad|>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
