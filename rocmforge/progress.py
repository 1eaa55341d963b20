"""A bar on standard error for work that takes a while."""

from __future__ import annotations

import sys
from time import monotonic
from types import TracebackType
from typing import Self, TextIO

__all__ = ["Progress", "is_terminal"]


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
    delay : float
        Seconds before the bar is shown, for work that is mostly over sooner. With a delay nothing
        is written where there is no terminal.
    """

    WIDTH = 30

    def __init__(self, label: str, total: float, delay: float = 0.0) -> None:
        self._label = label
        self._total = total
        self._delay = delay
        self._begin = monotonic()
        self._shown = -1
        self._stream = sys.stderr
        # without standard error, as in a daemon, there is nobody to show it to
        self._live = self._stream is not None and is_terminal(self._stream)

    def __enter__(self) -> Self:
        if self._live:
            self.update(0)
        elif not self._delay:
            self._stream.write(f"{self._label} ...\n")
            self._stream.flush()
        return self

    def update(self, amount: float) -> None:
        """Show that `amount` of the total is done; a bar that would look the same is left alone."""
        cells = int(self.WIDTH * min(1.0, amount / self._total)) if self._total else self.WIDTH
        if self._live and cells != self._shown and self._is_due():
            self._shown = cells
            bar = "#" * cells + "-" * (self.WIDTH - cells)
            self._stream.write(f"\r{self._label} [{bar}]")
            self._stream.flush()

    def _is_due(self) -> bool:
        return self._shown >= 0 or monotonic() - self._begin >= self._delay

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live and (self._shown >= 0 or not self._delay):
            if kind is None:
                self.update(self._total)
            self._stream.write("\n")
            self._stream.flush()
