"""Exported block hashes, against values that vLLM 0.32 computed (PYTHONHASHSEED=0, sha256_cbor)."""

import numpy as np
import pytest

from rocmforge.block_hashes import block_hashes

pytest.importorskip("cbor2")


def test_hashes_are_those_of_vllm() -> None:
    assert [digest.hex()[:16] for digest in block_hashes(range(48), 16, salt="s")] == [
        "1b5ea80e18d43d91",
        "f4f580faee8eed4c",
        "98d4ae6b75231060",
    ]


def test_only_full_blocks_and_any_integers() -> None:
    assert block_hashes([], 4) == block_hashes([1, 2, 3], 4) == []
    assert block_hashes(np.arange(9, dtype=np.int32), 4) == block_hashes(list(range(9)), 4)
    assert len(block_hashes(range(9), 4)[0]) == 32


def test_going_on_behind_a_parent() -> None:
    whole = block_hashes(range(12), 4)
    assert block_hashes(range(4, 12), 4, parent=whole[0]) == whole[1:]


def test_seed_salt_and_every_token_matter() -> None:
    first = block_hashes(range(8), 4)
    for other in (
        block_hashes(range(8), 4, seed="1"),
        block_hashes(range(8), 4, salt="t"),
        block_hashes([9, *range(1, 8)], 4),
    ):
        assert not set(first) & set(other)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="block_size: expected 1 or more, got 0"):
        block_hashes([1], 0)
    with pytest.raises(TypeError, match="token_ids: expected one dimension of integers"):
        block_hashes([[1]], 4)  # type: ignore[list-item]
    with pytest.raises(TypeError, match="token_ids: expected one dimension of integers"):
        block_hashes([1.5], 4)  # type: ignore[list-item]
