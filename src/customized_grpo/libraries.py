"""The libraries of large models, kept from talking into the display."""

import diffusers.utils.logging
import transformers.utils.logging


def quiet() -> None:
    """No bars and no notes; errors stay. Call it before the models' own modules are imported: some talk then."""
    for log in (diffusers.utils.logging, transformers.utils.logging):
        log.disable_progress_bar()
        log.set_verbosity_error()
