"""What the examples' commands share: their arguments, their screen, their end."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable

from rich.console import Console

from recsys_examples.errors import InputError


def run_command(work: Callable[[], None], needs: str, interrupted: str) -> int:
    """Do a command's work; return its exit status.

    Args:
        work: what the command does, on TensorFlow.
        needs: what it needs TensorFlow for, said where the backend is another one.
        interrupted: said when it is interrupted, or terminated.

    Returns:
        0, or 2 after an `InputError`, or 130 after an interrupt; both are told in one
        line of the error output.
    """
    # TensorFlow warns that models differ from each other, which here they should.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    try:
        backend = os.environ.get("KERAS_BACKEND", "tensorflow")
        if backend != "tensorflow":
            raise InputError(
                f"{needs} needs KERAS_BACKEND=tensorflow; the environment has "
                f"KERAS_BACKEND={backend}"
            )
        work()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return 130
    return 0


def end_as_interrupted() -> None:
    """Make a terminated command clean up as an interrupted one does."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def make_console(width: int = 150) -> Console:
    """Make a console. In a file or a pipe, tables have `width`."""
    return Console(width=None if sys.stdout.isatty() else width, highlight=False)


def whole_number(lowest: int, highest: int) -> Callable[[str], int]:
    """Make an argument type that takes the whole numbers of a range."""

    def parse(text: str) -> int:
        if text.isascii() and text.isdigit() and lowest <= int(text) <= highest:
            return int(text)
        raise argparse.ArgumentTypeError(
            f"must be a whole number from {lowest} to {highest}, not {text!r}"
        )

    return parse


def number(lowest: float, highest: float) -> Callable[[str], float]:
    """Make an argument type that takes the numbers of a range."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if lowest <= value <= highest:
            return value
        raise argparse.ArgumentTypeError(
            f"must be a number from {lowest:g} to {highest:g}, not {text!r}"
        )

    return parse
