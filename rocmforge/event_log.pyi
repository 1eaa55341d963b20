from typing import Never, final

from rocmforge.events import KVCacheEvent

@final
class EventLog:
    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
    @property
    def lost(self) -> int: ...
    def take(self) -> list[KVCacheEvent]: ...
