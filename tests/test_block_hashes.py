"""Exported block hashes, against values that vLLM 0.32 computed (PYTHONHASHSEED=0, sha256_cbor)."""

import numpy as np
import pytest

from rocmforge.block_hashes import block_hashes

pytest.importorskip("cbor2")


@pytest.mark.parametrize(
    ("salt", "expected"),
    [
        (None, ["d830de3d42c00f25", "fedd9e4abebebbe6", "ee4c34c217da17ac"]),
        ("s", ["d25ecb48760077f8", "54817328d536f07e", "beb73e941765bc03"]),
    ],
)
def test_hashes_are_those_of_vllm(salt: str | None, expected: list[str]) -> None:
    found = block_hashes(range(48), 16, salt=salt)
    assert [digest.hex()[:16] for digest in found] == expected


def test_only_full_blocks_and_any_integers() -> None:
    assert block_hashes([], 4) == block_hashes([1, 2, 3], 4) == []
    assert block_hashes(np.arange(9, dtype=np.int32), 4) == block_hashes(list(range(9)), 4)
    assert len(block_hashes(range(9), 4)[0]) == 32


def test_an_empty_salt_is_none() -> None:
    assert block_hashes(range(8), 4, salt="") == block_hashes(range(8), 4)


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
