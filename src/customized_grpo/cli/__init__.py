"""The command line: the parser and the dispatch, and a file for each command in `commands`."""
