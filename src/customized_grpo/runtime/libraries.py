"""The libraries of large models, kept from talking into the display."""

import logging

TALKATIVE = ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer")
"""Loggers that warn at import of what no run needs: kernels for other processors, deprecations in libraries."""


def silence_imports() -> None:
    """Silence the notes that libraries write when they are imported; nothing is imported here."""
    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)


def silence_libraries() -> None:
    """Silence progress bars and notes of libraries; errors stay.

    Call this before a model's own modules are imported: some print at import.
    """
    silence_imports()
    # They take seconds to import, and ToyBox needs neither.
    import diffusers.utils.logging
    import transformers.utils.logging

    for log in (diffusers.utils.logging, transformers.utils.logging):
        log.disable_progress_bar()
        log.set_verbosity_error()
