"""What every command shares of talking to a person: errors, units, options."""

import argparse

from rocmforge.progress import Progress, is_terminal

__all__ = [
    "CommandError",
    "Progress",
    "format_bytes",
    "is_terminal",
    "not_negative",
    "positive",
]


class CommandError(Exception):
    """A failure that the user can act on: its text is all they see, without a traceback."""


def format_bytes(count: float) -> str:
    """Give `count` bytes in the decimal unit that keeps it below a thousand."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def positive(text: str) -> int:
    """Read an option's value: an integer from 1 up."""
    return _integer(text, 1)


def not_negative(text: str) -> int:
    """Read an option's value: an integer from 0 up."""
    return _integer(text, 0)


def _integer(text: str, lowest: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = lowest - 1
    if not lowest <= value <= 2**31 - 1:
        raise argparse.ArgumentTypeError(f"an integer from {lowest} up is needed, not {text!r}")
    return value
