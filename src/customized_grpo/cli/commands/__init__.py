"""The commands, one in each file: its parser, and what it runs. torch is imported only inside `run`."""
