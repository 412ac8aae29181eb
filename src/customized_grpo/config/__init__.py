"""Every setting, and words for bad ones. Nothing here loads torch."""
