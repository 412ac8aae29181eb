"""`python -m customized_grpo`: the command line."""

from customized_grpo.cli.main import main

main()
