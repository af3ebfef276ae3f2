"""The one error that the examples raise for what a user gave."""


class InputError(ValueError):
    """What the user gave is wrong; the message is one line that names what and where.

    The command line prints the message alone and exits with status 2.
    """
