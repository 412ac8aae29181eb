"""The libraries of large models, kept from talking into the display."""


def silence_libraries() -> None:
    """No bars and no notes; errors stay. Call it before the models' own modules are imported: some talk then."""
    # They take seconds to import, and ToyBox needs neither.
    import diffusers.utils.logging
    import transformers.utils.logging

    for log in (diffusers.utils.logging, transformers.utils.logging):
        log.disable_progress_bar()
        log.set_verbosity_error()
