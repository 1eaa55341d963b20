"""What is shown while the model runs: answers, progress, units."""

import io
import os

import pytest

from rocmforge.cli import streaming
from rocmforge.cli.console import Progress, format_bytes
from rocmforge.cli.streaming import LiveDisplay, PlainDisplay, make_display


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and what its screen would show."""

    def isatty(self):
        return True

    def screen(self, rows=1000):
        """Lines after all output, for the three controls that are used."""
        lines, text, row = [""], self.getvalue(), 0
        while text:
            if text.startswith("\x1b["):
                end = next(i for i, c in enumerate(text) if c.isalpha())
                number, control, text = text[2:end], text[end], text[end + 1 :]
                if control == "A":
                    row -= int(number)
                    assert row >= 0, "moved above the screen"
                    assert row >= len(lines) - rows, "moved to what scrolled away"
                else:
                    assert control == "J"
                    lines = [*lines[:row], lines[row][:0]]
                continue
            c, text = text[0], text[1:]
            if c == "\n":
                row += 1
                if row == len(lines):
                    lines.append("")
            elif c == "\r":
                lines[row] = lines[row] if text.startswith("\x1b") else ""
            else:
                lines[row] += c
        return lines


def test_plain_answers_come_one_after_the_other():
    stream = io.StringIO()
    display = PlainDisplay(stream, ["one?", "two?", "three?"])
    display.feed(0, " A")
    assert stream.getvalue() == "> one?\nA"
    display.feed(1, "B")
    display.feed(2, "C")
    display.end(1)
    display.feed(0, "a")
    assert stream.getvalue() == "> one?\nAa"
    display.end(0)
    assert stream.getvalue() == "> one?\nAa\n\n> two?\nB\n\n> three?\nC"
    display.feed(2, "c")
    display.end(2)
    assert stream.getvalue().endswith("> three?\nCc\n\n")


def test_plain_answers_lose_blanks_at_the_start_and_control_characters():
    stream = io.StringIO()
    display = PlainDisplay(stream, ["on\x1be?"])
    for text in (" ", "\n", "", " a\x1b[2J\tb\x07", " c"):
        display.feed(0, text)
    display.end(0)
    assert stream.getvalue() == "> one?\na[2J\tb c\n\n"


@pytest.mark.parametrize("rows", [5, 12, 40])
def test_live_answers_grow_together(monkeypatch, rows):
    size = os.terminal_size((20, rows))
    monkeypatch.setattr(streaming, "get_terminal_size", lambda: size)
    terminal = Terminal()
    display = LiveDisplay(terminal, ["one?", "two?"])
    display.feed(0, " alpha")
    display.feed(1, "beta")
    if rows > 5:
        assert terminal.screen(rows) == ["> one?", "alpha", "", "> two?", "beta", "", ""]
    for i in range(30):
        display.feed(0, f" word{i}")
        display.feed(1, "\nnew" if i % 10 == 0 else "")
        assert len(terminal.screen(rows)) <= rows
    display.end(1)
    display.end(0)
    shown = terminal.screen(rows)
    assert [line for line in shown if line.startswith(">")] == ["> one?", "> two?"]
    text = " ".join(shown)
    assert all(f"word{i}" in text for i in range(30))  # at the end nothing is left out
    assert all(len(line) < 20 for line in shown)


def test_the_display_suits_the_stream(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(make_display(Terminal(), ["one?"]), LiveDisplay)
    assert isinstance(make_display(io.StringIO(), ["one?"]), PlainDisplay)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(make_display(Terminal(), ["one?"]), PlainDisplay)
    monkeypatch.delenv("TERM")
    assert isinstance(make_display(Terminal(), ["one?"]), PlainDisplay)


def test_progress_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", terminal)
    with Progress("loading", 10) as progress:
        progress.update(5)
        progress.update(5.01)
        assert terminal.getvalue().count("\r") == 2
        assert terminal.getvalue().endswith("[" + "#" * 15 + "-" * 15 + "]")
        progress.update(20)
    assert terminal.screen() == ["loading [" + "#" * 30 + "]", ""]


def test_progress_that_fails_keeps_its_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", terminal)
    with pytest.raises(KeyError), Progress("loading", 10):
        raise KeyError
    assert terminal.screen() == ["loading [" + "-" * 30 + "]", ""]


def test_progress_elsewhere(capsys):
    with Progress("loading", 10) as progress:
        progress.update(5)
    assert capsys.readouterr().err == "loading ...\n"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (98_362_432, "98.4 MB"),
        (1e12, "1 TB"),
        (5e15, "5e+03 TB"),
    ],
)
def test_units(count, text):
    assert format_bytes(count) == text
