"""Serving traces: which requests came when, how long they were, and what they had in common."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from rocmforge.cli.console import CommandError

__all__ = ["Request", "Trace", "read_trace"]

#: Tokens that one of Mooncake's ``hash_ids`` stands for.
MOONCAKE_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a trace."""

    arrival: float
    """In the trace's own unit; only the order counts."""
    prompt_tokens: int
    output_tokens: int
    contents: npt.NDArray[np.int32]
    """A number for each `Trace.content_size` tokens of the prompt: equal numbers, equal tokens."""


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of arrival."""

    name: str
    requests: list[Request]
    content_size: int
    """Tokens that one of the requests' contents stands for."""

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts together."""
        return sum(request.prompt_tokens for request in self.requests)

    @property
    def output_tokens(self) -> int:
        """Tokens generated, of all requests together."""
        return sum(request.output_tokens for request in self.requests)

    def tokens(self, request: Request) -> npt.NDArray[np.int32]:
        """Make up the tokens of a prompt, int32 ``[prompt_tokens]``.

        They repeat the number of their content: two prompts begin with the same tokens exactly as
        far as they begin with the same contents, which is all that a prefix cache looks at.
        """
        return np.repeat(request.contents, self.content_size)[: request.prompt_tokens]

    def ideal_hits(self, block_size: int) -> int:
        """Prompt tokens that a cache which forgets nothing finds, a request after the other.

        Of the longest beginning that a prompt has in common with an earlier one, whole blocks, and
        never the last token, which is always left to compute.
        """
        # A tree of contents: (node, content) -> node, and how many tokens of a content were there.
        children: dict[tuple[int, int], int] = {}
        seen: list[int] = [0]
        hits = 0
        for request in self.requests:
            node = common = depth = 0
            matches = True
            for content in request.contents.tolist():
                length = min(self.content_size, request.prompt_tokens - depth)
                child = children.get((node, content))
                if child is None:
                    child = children[node, content] = len(seen)
                    seen.append(0)
                if matches:
                    common += min(length, seen[child])
                    matches = min(length, seen[child]) == self.content_size
                seen[child] = max(seen[child], length)
                depth += length
                node = child
            hits += min(common, max(request.prompt_tokens - 1, 0)) // block_size * block_size
        return hits


def read_trace(path: Path, content_size: int = MOONCAKE_BLOCK) -> Trace:
    """Read a trace.

    A file whose name ends in ``.csv`` has lines of arrival, prompt length and output length, after
    at most one line of headings; its prompts have nothing in common. Any other file is Mooncake's
    JSON lines: ``timestamp``, ``input_length``, ``output_length`` and ``hash_ids``, of which each
    stands for `content_size` tokens.

    Raises
    ------
    CommandError
        If the file cannot be read, or has a line that is not one of a trace: it names the line.
    """
    is_csv = path.suffix.lower() == ".csv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = _csv_rows(path, file) if is_csv else _json_rows(path, file, content_size)
            found = list(rows)
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CommandError(f"{path}: it is no text: {error}") from error
    if not found:
        raise CommandError(f"{path}: it has no requests")
    if is_csv:
        content_size = max(1, *(row[1] for row in found))
    # Numbers below 2**31, in order of their first use, whatever the trace calls its contents.
    names: dict[object, int] = {}
    requests = []
    for arrival, prompt_tokens, output_tokens, contents in found:
        numbers = [names.setdefault(name, len(names)) for name in contents]
        requests.append(Request(arrival, prompt_tokens, output_tokens, np.array(numbers, np.int32)))
    requests.sort(key=lambda request: request.arrival)  # stable: ties stay in the file's order
    return Trace(path.stem, requests, content_size)


_Row = tuple[float, int, int, list[Any]]


def _json_rows(path: Path, lines: Iterator[str], content_size: int) -> Iterator[_Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            arrival = row["timestamp"]
            prompt_tokens, output_tokens = row["input_length"], row["output_length"]
            hash_ids = row["hash_ids"]
        except (ValueError, RecursionError) as error:
            raise CommandError(f"{path}:{number}: no JSON: {error}") from error
        except KeyError as error:
            raise CommandError(f"{path}:{number}: {error.args[0]} is missing") from error
        except TypeError as error:
            raise CommandError(f"{path}:{number}: expected an object, got {line[:40]!r}") from error
        is_number = isinstance(arrival, int | float) and not isinstance(arrival, bool)
        if not is_number or math.isnan(arrival):
            raise CommandError(f"{path}:{number}: timestamp: expected a number, got {arrival!r}")
        for name, value in (("input_length", prompt_tokens), ("output_length", output_tokens)):
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
                raise CommandError(f"{path}:{number}: {name}: expected tokens, got {value!r}")
        if not isinstance(hash_ids, list) or any(
            isinstance(name, bool) or not isinstance(name, int | str) for name in hash_ids
        ):
            raise CommandError(f"{path}:{number}: hash_ids: expected a list of integers or strings")
        expected = -(-prompt_tokens // content_size)
        if len(hash_ids) != expected:
            raise CommandError(
                f"{path}:{number}: hash_ids: {len(hash_ids)} of them, {prompt_tokens} tokens have "
                f"{expected} blocks of {content_size} (--trace-block-size)"
            )
        yield float(arrival), prompt_tokens, output_tokens, hash_ids


def _csv_rows(path: Path, lines: Iterator[str]) -> Iterator[_Row]:
    reader = csv.reader(lines)
    is_first = True
    try:
        for row in reader:
            if not row:
                continue
            fields = [field.strip() for field in row]
            number = reader.line_num
            if is_first and not any(field.isdecimal() for field in fields):
                is_first = False  # headings
                continue
            is_first = False
            if len(fields) != 3:
                raise CommandError(
                    f"{path}:{number}: expected arrival, prompt length and output length, "
                    f"got {len(fields)} fields"
                )
            lengths = []
            for name, field in zip(("prompt", "output"), fields[1:], strict=True):
                if not (field.isascii() and field.isdecimal()) or int(field) >= 2**31:
                    raise CommandError(
                        f"{path}:{number}: {name} length: expected tokens, got {field!r}"
                    )
                lengths.append(int(field))
            contents = [number] if lengths[0] else []  # of its own: nobody shares it
            yield _arrival(path, number, fields[0]), lengths[0], lengths[1], contents
    except csv.Error as error:
        raise CommandError(f"{path}:{reader.line_num}: {error}") from error


def _arrival(path: Path, number: int, text: str) -> float:
    """Read a number, or a date and time as the Azure traces have it."""
    try:
        value = float(text)
    except ValueError:
        try:
            value = datetime.fromisoformat(text).timestamp()
        except ValueError:
            value = math.nan
    if math.isnan(value):
        raise CommandError(f"{path}:{number}: arrival: expected a number or a time, got {text!r}")
    return value
