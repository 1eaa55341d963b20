"""vLLM with this library's KV write and attention in every layer: ``ROCMFORGE_VLLM=1``.

The wheel's entry point in ``vllm.general_plugins`` makes vLLM call `register` in each of its
processes (API server, engine core, workers). Installing the package beside vLLM changes nothing
until somebody asks for it; nothing here imports vLLM or PyTorch before that.
"""

import importlib
import logging
import os
from typing import Any

__all__ = ["SUPPORTED_VERSIONS", "is_wanted", "register"]

#: First version of vLLM whose attention interface this is, and the first that is not tried.
SUPPORTED_VERSIONS = ("0.32.0", "0.33.0")

#: What vLLM imports when it looks for a backend, by the platform's name in its registry.
_BACKENDS = {
    "CPU_ATTN": "rocmforge.integrations.vllm.backend.CPUBackend",
    "CUSTOM": "rocmforge.integrations.vllm.backend.CustomBackend",
}

_SWITCH = "ROCMFORGE_VLLM"


def is_wanted() -> bool:
    """Whether this process's environment asks for the backend.

    ``ROCMFORGE_VLLM`` is 1, or it is not set and vLLM's own ``VLLM_PLUGINS`` names ``rocmforge``.

    Raises
    ------
    ValueError
        ``ROCMFORGE_VLLM`` is neither 0, 1 nor empty.
    """
    switch = os.environ.get(_SWITCH, "").strip()
    if switch not in ("", "0", "1"):
        raise ValueError(f"{_SWITCH} must be 0 or 1, got {switch!r}")
    if switch:
        return switch == "1"
    return "rocmforge" in os.environ.get("VLLM_PLUGINS", "").split(",")


def register() -> None:
    """Register the attention backend with vLLM: its general plugin.

    On vLLM's CPU platform the backend takes the place of ``CPU_ATTN``, the only one that platform
    asks for. Elsewhere it is registered as ``CUSTOM``, to be chosen with
    ``--attention-backend CUSTOM``. May be called again; does nothing unless `is_wanted`.

    Raises
    ------
    ImportError
        vLLM, or the version of it that is installed, is not one this library works with.
    ValueError
        ``ROCMFORGE_VLLM`` is neither 0, 1 nor empty.
    """
    if not is_wanted():
        return
    check_version()
    registry: Any = importlib.import_module("vllm.v1.attention.backends.registry")
    platforms: Any = importlib.import_module("vllm.platforms")
    name = "CPU_ATTN" if platforms.current_platform.is_cpu() else "CUSTOM"
    registry.register_backend(registry.AttentionBackendEnum[name], _BACKENDS[name])
    # below vLLM's own logger, which it configures
    logging.getLogger("vllm.rocmforge").info("rocmforge is the attention backend %s", name)


def check_version() -> None:
    """Raise ImportError, with what to do, unless vLLM is of a version that was tried."""
    first, end = SUPPORTED_VERSIONS
    try:
        vllm: Any = importlib.import_module("vllm")
    except ImportError as error:
        raise ImportError(
            f"rocmforge.integrations.vllm needs vLLM {first} or newer, below {end}, and it cannot "
            f"be imported ({error}): pip install 'rocmforge[vllm]'"
        ) from error
    version = str(getattr(vllm, "__version__", "unknown"))
    if not _release(first) <= _release(version) < _release(end):
        raise ImportError(
            f"this rocmforge works with vLLM {first} or newer, below {end}, and {version} is "
            f"installed: install one of those, or unset {_SWITCH} to run vLLM without it"
        )


def _release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: local parts and release candidates do not count."""
    numbers = []
    for part in version.partition("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
