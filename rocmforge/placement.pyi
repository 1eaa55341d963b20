from typing import Any

import numpy as np
import numpy.typing as npt

from rocmforge.shared_sequences import SharedSequences

def describe(manager: SharedSequences, sequence_id: int) -> dict[str, Any]: ...
def place(
    manager: SharedSequences,
    sequence_id: int,
    token_ids: Any,
    salt: bytes | str | None,
    priority: int,
    length: int,
    committed: int,
    firsts: list[int],
    shares: bool,
    started: bool,
) -> tuple[int, list[npt.NDArray[np.int32]], int]: ...
def is_placed(manager: SharedSequences, sequence_id: int, version: int) -> bool: ...
def publish(manager: SharedSequences, sequence_id: int, version: int) -> None: ...
def num_resets(manager: SharedSequences) -> int: ...
