"""A manager to test, what a fresh batch of it must say, and the calls that take a sequence id."""

import numpy as np

from rocmforge import KVCacheManager

BY_ID = {
    "add_sequence": lambda m, i: m.add_sequence(i),
    "fork from": lambda m, i: m.fork(i, 50),
    "fork to": lambda m, i: m.fork(0, i),
    "free": lambda m, i: m.free(i),
    "seq_len": lambda m, i: m.seq_len(i),
    "committed_len": lambda m, i: m.committed_len(i),
    "in": lambda m, i: i in m,
}


def manager_of(lengths, num_blocks=64, block_size=4, **limits):
    """A manager with committed sequences of these lengths, added in order."""
    manager = KVCacheManager(num_blocks, block_size=block_size, **limits)
    for sequence_id, length in lengths.items():
        manager.add_sequence(sequence_id)
        if length:
            manager.commit(manager.append([sequence_id], length))
    return manager


def blocks_of(manager, sequence_id):
    return manager.page_table.block_ids(sequence_id).tolist()


def check_batch(manager, batch, sequence_ids, num_tokens):
    """Every array of a fresh batch says what the page table says."""
    size, table = manager.block_size, manager.page_table
    assert batch.sequence_ids.tolist() == list(sequence_ids)
    ends = [manager.seq_len(i) for i in sequence_ids]
    assert batch.seq_lens.tolist() == ends
    assert batch.cu_seqlens_q.tolist() == [0, *np.cumsum(num_tokens).tolist()]
    positions = [p for end, n in zip(ends, num_tokens, strict=True) for p in range(end - n, end)]
    assert batch.positions.tolist() == positions
    flat_ids = np.repeat(batch.sequence_ids, num_tokens)
    assert batch.slot_mapping.tolist() == table.slot_mapping(flat_ids, positions).tolist()
    for sequence_id, row, end in zip(sequence_ids, batch.rows, ends, strict=True):
        num_blocks = -(-end // size)
        assert batch.block_table[row, :num_blocks].tolist() == blocks_of(manager, sequence_id)
    assert (batch.num_tokens, len(batch)) == (sum(num_tokens), len(sequence_ids))
    assert (batch.max_seqlen_q, batch.max_seq_len) == (max(num_tokens), max(ends))
    assert not batch.committed
    dtypes = {
        "sequence_ids": np.uint64, "rows": np.int32, "seq_lens": np.int32,
        "cu_seqlens_q": np.int32, "positions": np.int64, "slot_mapping": np.int64,
        "copies": np.int32, "block_table": np.int32,
    }  # fmt: skip
    assert {name: getattr(batch, name).dtype for name in dtypes} == dtypes
    manager.check_integrity()
