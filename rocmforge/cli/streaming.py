"""Showing several answers while they are produced.

On a terminal all of them grow at the same time, each below its question; in a pipe or a file they
come one after the other: the first as it is produced, the others as soon as the one before is
complete.
"""

import textwrap
import unicodedata
from collections.abc import Sequence
from shutil import get_terminal_size
from typing import Protocol, TextIO

from rocmforge.cli.console import is_terminal

__all__ = ["LiveDisplay", "PlainDisplay", "make_display"]


class Display(Protocol):
    """Takes the text of answers, by the index of the question."""

    def feed(self, index: int, text: str) -> None:
        """Take more text of answer `index`."""

    def end(self, index: int) -> None:
        """Take the end of answer `index`; after the last one everything is shown."""


def make_display(stream: TextIO, questions: Sequence[str]) -> Display:
    """Choose the display that suits `stream`."""
    return (LiveDisplay if is_terminal(stream) else PlainDisplay)(stream, questions)


def _printable(text: str) -> str:
    # A model may produce any byte, and the terminal would obey the control characters.
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


class PlainDisplay:
    """Answers one after the other, nothing ever taken back: for pipes and files."""

    def __init__(self, stream: TextIO, questions: Sequence[str]) -> None:
        self._stream = stream
        self._questions = questions
        self._waiting = [""] * len(questions)
        self._ended = [False] * len(questions)
        self._current = 0
        self._begin()

    def _begin(self) -> None:
        """Show the next question and what its answer has so far."""
        self._at_start = True
        self._stream.write(f"> {_printable(self._questions[self._current])}\n")
        self._write(self._waiting[self._current])

    def _write(self, text: str) -> None:
        if self._at_start:
            text = text.lstrip()
            self._at_start = not text
        self._stream.write(text)
        self._stream.flush()

    def feed(self, index: int, text: str) -> None:
        """Take more text of answer `index`."""
        text = _printable(text)
        if index == self._current:
            self._write(text)
        else:
            self._waiting[index] += text

    def end(self, index: int) -> None:
        """Take the end of answer `index`; after the last one everything is shown."""
        self._ended[index] = True
        while self._current < len(self._ended) and self._ended[self._current]:
            self._write("\n\n")
            self._current += 1
            if self._current < len(self._ended):
                self._begin()


class LiveDisplay:
    """All answers at once on a terminal, redrawn in place as they grow."""

    def __init__(self, stream: TextIO, questions: Sequence[str]) -> None:
        self._stream = stream
        self._questions = [_printable(question) for question in questions]
        self._answers = [""] * len(questions)
        self._ended = [False] * len(questions)
        self._drawn = 0  # lines on the screen that the next drawing replaces
        self._draw()

    def feed(self, index: int, text: str) -> None:
        """Take more text of answer `index`."""
        self._answers[index] += _printable(text)
        if text:
            self._draw()

    def end(self, index: int) -> None:
        """Take the end of answer `index`; after the last one everything is shown."""
        self._ended[index] = True
        if all(self._ended):
            self._draw(whole=True)

    def _draw(self, *, whole: bool = False) -> None:
        columns, rows = get_terminal_size()
        # What scrolled off the screen cannot be replaced, so until the end each answer gets its
        # share of the screen and shows its last lines.
        share = max(1, (rows - 1) // len(self._questions) - 2)
        lines: list[str] = []
        for question, answer in zip(self._questions, self._answers, strict=True):
            text = _wrap(answer.strip(), columns - 1)
            lines += [
                _wrap(f"> {question}", columns - 1)[0],
                *(text if whole else text[-share:]),
                "",
            ]
        if not whole:
            lines = lines[-(rows - 1) :]
        back = f"\x1b[{self._drawn}A\r\x1b[J" if self._drawn else ""
        self._stream.write(back + "".join(line + "\n" for line in lines))
        self._stream.flush()
        self._drawn = len(lines)


def _wrap(text: str, width: int) -> list[str]:
    lines: list[str] = []
    for paragraph in text.expandtabs().split("\n"):
        lines += textwrap.wrap(paragraph, max(width, 8), drop_whitespace=False) or [""]
    return lines
