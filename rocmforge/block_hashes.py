"""Block hashes that routers and other engines can compare: vLLM's ``sha256_cbor``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["block_hashes"]


def block_hashes(
    token_ids: Sequence[int] | npt.NDArray[np.integer[Any]],
    block_size: int = 16,
    *,
    seed: str = "0",
    salt: str | None = None,
    parent: bytes | None = None,
) -> list[bytes]:
    """Hash the full blocks of a sequence as vLLM does where it is told to use ``sha256_cbor``.

    A hash covers its block's tokens and all before them, so that a router that keeps the hashes of
    several engines knows how much of a prompt each has cached. The cache itself never uses them:
    its hits compare tokens.

    Parameters
    ----------
    token_ids : sequence of int, or integer array ``[n]``
        The tokens of a prompt.
    block_size : int
        Tokens a block, as in the engines compared.
    seed : str
        The value of ``PYTHONHASHSEED`` that the engines run with.
    salt : str, optional
        vLLM's ``cache_salt``: part of the first block's hash; an empty one is none.
    parent : bytes, optional
        The hash of the block before, to go on behind it; `seed` and `salt` then have no part.

    Returns
    -------
    list of bytes
        A digest of 32 bytes for each full block.

    Raises
    ------
    ValueError
        If `block_size` is below 1.
    TypeError
        If the tokens are no integers.
    ImportError
        If ``cbor2`` is not installed (extra ``hashes``).

    Notes
    -----
    The digest is SHA-256 over the canonical CBOR of ``(parent digest, tokens, extra keys)``, where
    the first block's parent is the digest of the seed and a salt stands among the extra keys as
    ``("cache_salt", salt)``, as in ``vllm/v1/core/kv_cache_utils.py``; compared with vLLM 0.32.

    Examples
    --------
    >>> [digest.hex()[:8] for digest in block_hashes(range(40), block_size=16)]
    ['d830de3d', 'fedd9e4a']
    """
    try:
        import cbor2
    except ImportError as error:
        raise ImportError('block_hashes needs cbor2: pip install "rocmforge[hashes]"') from error

    def digest(content: object) -> bytes:
        return hashlib.sha256(cbor2.dumps(content, canonical=True)).digest()

    if block_size < 1:
        raise ValueError(f"block_size: expected 1 or more, got {block_size}")
    tokens = np.asarray(token_ids)
    if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
        raise TypeError(
            f"token_ids: expected one dimension of integers, got {tokens.dtype} {tokens.shape}"
        )
    extra = (("cache_salt", salt),) if salt and parent is None else None
    previous = digest(seed) if parent is None else parent
    hashes = []
    for begin in range(0, tokens.size - block_size + 1, block_size):
        previous = digest((previous, tuple(tokens[begin : begin + block_size].tolist()), extra))
        hashes.append(previous)
        extra = None
    return hashes
