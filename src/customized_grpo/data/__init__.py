"""Subject datasets on disk -> typed samples and tensors."""

from customized_grpo.data.batches import batch_indices
from customized_grpo.data.dataset import Sample, SubjectDataset, write_metadata
from customized_grpo.data.images import (
    MAX_PIXELS,
    fit,
    image_grid,
    inspect_image,
    load_image,
    load_mask,
    resize_square,
    save_image,
)

__all__ = [
    "MAX_PIXELS",
    "Sample",
    "SubjectDataset",
    "batch_indices",
    "fit",
    "image_grid",
    "inspect_image",
    "load_image",
    "load_mask",
    "resize_square",
    "save_image",
    "write_metadata",
]
