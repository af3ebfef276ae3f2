"""Shared by the example commands: argument types, the console, exit statuses."""

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
    """Run a command's main function and return its exit status.

    Args:
        work: the main function of the command. It requires the TensorFlow backend.
        needs: subject of the error message on another backend: "{needs} needs
            KERAS_BACKEND=tensorflow".
        interrupted: message after an interrupt or termination.

    Returns:
        0; 2 after an `InputError` or an error of the system (`OSError`), such as a full
        disk; 130 after an interrupt. Errors are printed to stderr in one line.
    """
    # TensorFlow warns about retracing, which is expected with many different models.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    try:
        backend = os.environ.get("KERAS_BACKEND", "tensorflow")
        if backend != "tensorflow":
            raise InputError(
                f"{needs} needs KERAS_BACKEND=tensorflow; the environment has "
                f"KERAS_BACKEND={backend}"
            )
        work()
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        return _failed(error)
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return 130
    return 0


def _failed(error: OSError) -> int:
    """Print an error of the system that no InputError describes; return 2."""
    where = error.filename
    try:
        sys.stdout.flush()
    except OSError as broken:
        # What is left in the buffer would fail again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        where, error = "the standard output", broken
    place = f"{where}: " if where else ""
    print(f"error: {place}{error.strerror or error}", file=sys.stderr)
    return 2


def interrupt_on_sigterm() -> None:
    """Make SIGTERM raise KeyboardInterrupt, so that the command cleans up."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def make_console(width: int = 150) -> Console:
    """Return a console; `width` applies if stdout is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else width, highlight=False)


def whole_number(lowest: int, highest: int) -> Callable[[str], int]:
    """Return an argparse type for integers from `lowest` to `highest`."""

    def parse(text: str) -> int:
        if text.isascii() and text.isdigit() and lowest <= int(text) <= highest:
            return int(text)
        raise argparse.ArgumentTypeError(
            f"must be a whole number from {lowest} to {highest}, not {text!r}"
        )

    return parse


def number(lowest: float, highest: float) -> Callable[[str], float]:
    """Return an argparse type for numbers from `lowest` to `highest`."""

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
