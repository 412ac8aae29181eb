"""The error a user can mend."""


class UserError(Exception):
    """Bad input, said in one clear message: what was found, where, what was expected and what to do.

    The command line prints the message and exits with status 2.
    """
