"""The problems of ops_cases.py on a device, and what comes back from there."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from ops_cases import Problem, assert_close
from rocmforge import hip, reference
from rocmforge.ops import paged_attention


def up(array: Any, device: hip.Device) -> Any:
    """An array on the device; anything else as it is."""
    return hip.from_numpy(array, device) if isinstance(array, np.ndarray) else array


def on(problem: Problem, device: hip.Device) -> Problem:
    """The problem with its arrays on a device."""
    return problem.but(**{f.name: up(getattr(problem, f.name), device) for f in fields(problem)})


def attend(problem: Problem, device: hip.Device, **kwargs: Any) -> Any:
    """The result of paged_attention on a device, as NumPy arrays."""
    moved = {name: up(value, device) for name, value in kwargs.items()}
    got = on(problem, device).call(paged_attention, **moved)
    return tuple(a.numpy() for a in got) if isinstance(got, tuple) else got.numpy()


def check(
    problem: Problem, device: hip.Device, *, launch: dict[str, Any] | None = None, **kwargs: Any
) -> None:
    """Result and log-sum-exp against the float64 oracle; `launch`: what only a GPU takes."""
    out, lse = attend(problem, device, return_lse=True, **kwargs, **(launch or {}))
    assert out.dtype == problem.query.dtype
    want, want_lse = problem.call(reference.paged_attention, return_lse=True, **kwargs)
    assert_close(out, want)
    np.testing.assert_allclose(lse, want_lse, rtol=2e-6, atol=5e-6)
