"""The libraries of large models, kept from talking into the display."""


def silence_libraries() -> None:
    """Silence progress bars and notes of libraries; errors stay.

    Call this before a model's own modules are imported: some print at import.
    """
    # They take seconds to import, and ToyBox needs neither.
    import diffusers.utils.logging
    import transformers.utils.logging

    for log in (diffusers.utils.logging, transformers.utils.logging):
        log.disable_progress_bar()
        log.set_verbosity_error()
