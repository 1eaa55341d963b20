"""Every error that ROCmForge raises on purpose.

Each is a :class:`RocmForgeError` and also the built-in exception that a caller who has never read
this page would catch. After any of them the object that raised is valid and as it was before the
call. Bad arguments raise the plain built-ins: ``ValueError`` for a wrong value, shape, dtype or
device, ``TypeError`` for a wrong kind of object.
"""

__all__ = [
    "DeviceError",
    "InvalidBlockError",
    "OutOfBlocksError",
    "RocmForgeError",
    "SnapshotError",
    "UnknownSequenceError",
]


class RocmForgeError(Exception):
    """Base of all errors of this library."""


class OutOfBlocksError(RocmForgeError, MemoryError):
    """The pool cannot give as many blocks as were asked for.

    Attributes
    ----------
    requested : int
        Blocks that the call needed.
    available : int
        Blocks that it could have had: free ones and evictable ones.
    """

    def __init__(self, requested: int, available: int) -> None:
        super().__init__(f"out of blocks: {requested} requested, {available} free")
        self.requested = requested
        self.available = available

    def __reduce__(self) -> tuple[type, tuple[int, int]]:
        """Pickle by the two numbers: the message is made from them."""
        return type(self), (self.requested, self.available)


class UnknownSequenceError(RocmForgeError, KeyError):
    """No sequence of this id is in the table or cache."""

    __str__ = Exception.__str__  # KeyError would show the message in quotes


class InvalidBlockError(RocmForgeError, ValueError):
    """A block id that is out of range, not allocated, or named twice."""


class DeviceError(RocmForgeError, RuntimeError):
    """A device is absent, or a call to its runtime failed."""


class SnapshotError(RocmForgeError, ValueError):
    """A saved state is damaged, of another kind, or of a newer version; nothing was changed."""
