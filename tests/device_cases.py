"""The problems of ops_cases.py on a device, and what comes back from there."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from ops_cases import BFLOAT16, EIGHT_BIT, FLOAT16, FLOAT32, Problem, assert_close
from rocmforge import hip, reference
from rocmforge.ops import paged_attention

# Of paged_attention, for problems with four query heads.
FEATURES = {
    "window": {"window_size": (17, 0)},
    "window of one": {"window_size": (0, 0)},
    "two-sided window": {"window_size": (9, 5), "causal": False},
    "right side": {"window_size": (-1, 3), "causal": False},
    "scale": {"scale": 0.31},
    "soft cap": {"softcap": 2.5},
    "alibi": {"alibi_slopes": np.array([0.5, 0.25, 0.125, 0.0625], np.float32)},
    "sinks": {"sinks": np.array([0.5, -1.0, 3.0, -np.inf], np.float32)},
    "all": {
        "window_size": (40, 0),
        "softcap": 5.0,
        "alibi_slopes": np.array([0.5, 0.25, 0.125, 0.0625], np.float32),
        "sinks": np.array([0.5, -1.0, 3.0, 0.0], np.float32),
    },
}

# Kernels round each probability to the type of the cache, over an 8-bit one to float16, where the
# query has 16 bits and the chip multiplies such pairs or matrices: it moves a result by up to this
# part of sum(p * |v|) / sum(p).
ROUNDING = {FLOAT16: 2.0**-11, BFLOAT16: 2.0**-8, **dict.fromkeys(EIGHT_BIT, 2.0**-11)}


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
    bound: Any = 0.0
    if problem.k_cache.dtype in ROUNDING and problem.query.dtype != FLOAT32:
        magnitudes = problem.but(v_cache=np.abs(problem.v_cache.astype(np.float32)))
        bound = magnitudes.call(reference.paged_attention, **kwargs)
        bound = bound * ROUNDING[problem.k_cache.dtype]
    assert_close(out, want, bound, rounds=True)
    # gfx90a's matrix unit takes elements of float16 below 2^-14 for 0
    flushes = device.architecture.startswith("gfx90a") and problem.k_cache.dtype == FLOAT16
    atol = 5e-5 if flushes else 5e-6
    np.testing.assert_allclose(lse, want_lse, rtol=2e-6, atol=atol)
