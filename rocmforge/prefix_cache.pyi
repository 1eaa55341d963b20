from typing import Never, final

@final
class PrefixCache:
    def __init__(self, *args: Never, **kwargs: Never) -> None: ...
