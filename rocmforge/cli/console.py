"""What every command shares of talking to a person: errors, units, one progress bar."""

import sys
from types import TracebackType
from typing import Self, TextIO

__all__ = ["CommandError", "Progress", "format_bytes", "is_terminal"]


class CommandError(Exception):
    """A failure that the user can act on: its text is all they see, without a traceback."""


def format_bytes(count: float) -> str:
    """Give `count` bytes in the decimal unit that keeps it below a thousand."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def is_terminal(stream: TextIO) -> bool:
    """Tell whether `stream` is a terminal that understands cursor movement."""
    import os

    return stream.isatty() and os.environ.get("TERM") not in (None, "", "dumb")


class Progress:
    """One line on standard error: a moving bar on a terminal, start and end anywhere else.

    Parameters
    ----------
    label : str
        What is going on, such as ``"downloading"``.
    total : float
        The amount at which it is done.
    """

    WIDTH = 30

    def __init__(self, label: str, total: float) -> None:
        self._label = label
        self._total = total
        self._shown = -1
        self._stream = sys.stderr
        self._live = is_terminal(self._stream)

    def __enter__(self) -> Self:
        if self._live:
            self.update(0)
        else:
            self._stream.write(f"{self._label} ...\n")
            self._stream.flush()
        return self

    def update(self, amount: float) -> None:
        """Show that `amount` of the total is done; a bar that would look the same is left alone."""
        cells = int(self.WIDTH * min(1.0, amount / self._total))
        if self._live and cells != self._shown:
            self._shown = cells
            bar = "#" * cells + "-" * (self.WIDTH - cells)
            self._stream.write(f"\r{self._label} [{bar}]")
            self._stream.flush()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live:
            if kind is None:
                self.update(self._total)
            self._stream.write("\n")
            self._stream.flush()
