# cython: auto_pickle=False, embedsignature=True, embedsignature.format=python
# cython: boundscheck=False, wraparound=False, initializedcheck=False, cdivision=True
"""The log of what happened to cached blocks, and the events that are made of it when asked."""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int32_t, int64_t, uint8_t

from rocmforge._core cimport (
    RF_EVENT_CLEARED, RF_EVENT_STORED, RF_NO_NODE, RF_OK, rf_event, rf_event_log_at,
    rf_event_log_cleared, rf_event_log_drop, rf_event_log_free, rf_event_log_init,
    rf_event_log_name, rf_event_log_removed, rf_event_log_stored, rf_event_log_tokens,
    rf_prefix_index, rf_prefix_index_node)

import hashlib

from rocmforge.events import AllBlocksCleared, BlockRemoved, BlockStored


cdef bytes cbor_head(int major, int64_t number):
    """The head of a CBOR item in as few bytes as it takes."""
    if number < 24:
        return bytes([major << 5 | number])
    size = 1 if number < 1 << 8 else 2 if number < 1 << 16 else 4 if number < 1 << 32 else 8
    return bytes([major << 5 | (23 + int(size).bit_length())]) + int(number).to_bytes(size, "big")


cdef object extra_keys(object salt):
    """The extra keys of the first block below a salt, ``(("cache_salt", salt),)``, in CBOR: of the
    text it stands for, or of the bytes where it is none. None for no salt."""
    if not salt:
        return None
    try:
        salt.decode()
        major = 3
    except UnicodeDecodeError:
        major = 2
    name = b"cache_salt"
    return (cbor_head(4, 1) + cbor_head(4, 2) + cbor_head(3, len(name)) + name
            + cbor_head(major, len(salt)) + salt)


@cython.final
cdef class EventLog:
    """What happened to cached blocks since it was last asked, for `KVCacheManager`."""

    def __init__(self):
        raise TypeError("an EventLog is made by its manager")

    def __dealloc__(self):
        rf_event_log_free(&self.log)

    cdef int add_root(self, int32_t root, object extra) except -1:
        """Note the `extra_keys` of a root's salt."""
        self.extras[root] = extra
        return 0

    cdef void name(self, rf_prefix_index *index, int32_t node) noexcept:
        """Name a node whose parent has a name or is a root."""
        cdef int32_t parent = index.nodes[node].parent
        cdef const int32_t *tokens = index.tokens + <int64_t> node * self.log.block_size
        cdef const uint8_t *extra = NULL
        cdef int64_t size = 0
        if index.nodes[parent].parent == RF_NO_NODE:
            found = self.extras.get(parent)
            if found is not None:
                extra = <const uint8_t *> PyBytes_AS_STRING(found)
                size = PyBytes_GET_SIZE(found)
            rf_event_log_name(&self.log, node, RF_NO_NODE, tokens, extra, size)
        else:
            rf_event_log_name(&self.log, node, parent, tokens, NULL, 0)

    cdef void stored(self, rf_prefix_index *index, int32_t group, int32_t node) noexcept:
        cdef int32_t parent = index.nodes[node].parent
        if index.nodes[parent].parent == RF_NO_NODE:
            parent = RF_NO_NODE
        rf_event_log_stored(&self.log, group, node, parent,
                            index.tokens + <int64_t> node * self.log.block_size)

    cdef void removed(self, rf_prefix_index *index, int32_t group, int32_t block) noexcept:
        """Note that a block loses its content; before it does."""
        cdef int32_t node = rf_prefix_index_node(index, group, block)
        if node != RF_NO_NODE:
            rf_event_log_removed(&self.log, group, node)

    cdef void cleared(self) noexcept:
        rf_event_log_cleared(&self.log)

    @property
    def lost(self):
        """Events that were dropped."""
        return self.log.lost

    def take(self):
        """The events since the last call, oldest first; those that follow from each other in one.
        """
        cdef rf_event event
        cdef const int32_t *tokens
        cdef int32_t k
        events, last, newest = [], None, None
        while self.log.num:
            # One at a time, each copied and dropped at once: making objects may run code that makes
            # more events, or takes some itself.
            event = rf_event_log_at(&self.log, 0)[0]
            copied = PyBytes_FromStringAndSize(
                <const char *> rf_event_log_tokens(&self.log, 0),
                self.log.block_size * sizeof(int32_t) if event.kind == RF_EVENT_STORED else 0)
            rf_event_log_drop(&self.log, 1)
            group, is_first = event.group, event.is_first
            name = PyBytes_FromStringAndSize(<const char *> event.name, 32)
            parent = PyBytes_FromStringAndSize(<const char *> event.parent, 32)
            if event.kind == RF_EVENT_CLEARED:
                last = AllBlocksCleared()
            elif event.kind == RF_EVENT_STORED:
                tokens = <const int32_t *> PyBytes_AS_STRING(copied)
                ids = [tokens[k] for k in range(self.log.block_size)]
                if (type(last) is BlockStored and last.group_idx == group and not is_first
                        and newest == parent):
                    newest = name
                    last.block_hashes.append(name)
                    last.token_ids.extend(ids)
                    continue
                newest = name
                last = BlockStored(
                    [name], None if is_first else parent, ids, self.log.block_size,
                    medium=self.medium, group_idx=group)
            elif type(last) is BlockRemoved and last.group_idx == group:
                last.block_hashes.append(name)
                continue
            else:
                last = BlockRemoved([name], medium=self.medium, group_idx=group)
            events.append(last)
        return events


cdef EventLog new_event_log(rf_prefix_index *index, int32_t capacity, str seed, object medium):
    cdef EventLog made = EventLog.__new__(EventLog)
    # the canonical CBOR of the seed, as text
    text = seed.encode()
    root_name = hashlib.sha256(cbor_head(3, len(text)) + text).digest()
    if rf_event_log_init(&made.log, capacity, index.block_size, index.capacity,
                         <const uint8_t *> PyBytes_AS_STRING(root_name)) != RF_OK:
        raise MemoryError(f"no memory for {capacity} events")
    made.extras = {}
    made.medium = medium
    return made
