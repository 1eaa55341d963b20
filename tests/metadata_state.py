"""All that can be seen of a metadata structure, to prove that a failed call changed nothing."""

from contextlib import contextmanager
from functools import singledispatch

import pytest

from rocmforge import BlockAllocator, KVCacheManager, PageTable


@singledispatch
def state_of(thing):
    raise NotImplementedError(type(thing))


@state_of.register
def _(table: PageTable):
    return {
        "block_size": table.block_size,
        "blocks": {int(i): table.block_ids(i).tolist() for i in table.sequence_ids()},
    }


@state_of.register
def _(allocator: BlockAllocator):
    return {
        "free": allocator.get_free_count(),
        "kept": allocator.num_kept,
        "blocks": [allocator.get_block(i) for i in range(allocator.num_blocks)],
    }


@state_of.register
def _(manager: KVCacheManager):
    ids = sorted(int(i) for i in manager.page_table.sequence_ids())
    return {
        "stats": manager.stats(),
        "groups": [(state_of(g.page_table), state_of(g.allocator)) for g in manager.groups],
        "lengths": {i: (manager.seq_len(i), manager.committed_len(i)) for i in ids},
        "table": [(g.table_epoch, g.block_table.tolist()) for g in manager.groups],
    }


@contextmanager
def raises_unchanged(thing, error, message=""):
    """Expect exactly this error with this text in its message, and `thing` as it was before."""
    before = state_of(thing)
    with pytest.raises(error) as caught:
        yield caught
    assert caught.type is error
    assert message in str(caught.value)
    thing.check_integrity()
    assert state_of(thing) == before
