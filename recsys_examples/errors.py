"""The error that the examples raise for invalid user input."""


class InputError(ValueError):
    """Invalid user input. The message is one line that names the input and the fault.

    The command line prints the message without a traceback and exits with status 2.
    """
