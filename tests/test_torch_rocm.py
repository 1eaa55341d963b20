"""PyTorch's tensors on a GPU, where there is neither: its tensors say that they are on a device.

In a process of its own on the simulated device, where `RF_SIMULATED` says that it was built (see
tests/device/conftest.py): PyTorch for CPUs is made to describe its tensors as on ROCm, whose memory
that device reads as any other. What a stream is given it does when somebody waits for that stream.
"""

import ctypes
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

SIMULATED = os.environ.get("RF_SIMULATED")
if not SIMULATED:
    pytest.skip("RF_SIMULATED names no simulated device", allow_module_level=True)
torch = pytest.importorskip("torch")
LIBRARY = ctypes.CDLL(str(Path(SIMULATED, "libamdhip64.so")))
os.environ["ROCMFORGE_CODE_OBJECTS"] = str(Path(SIMULATED, "code_objects"))

from exchange import Describe, Exchange, Stream, capsule  # noqa: E402
from foreign import ROCM  # noqa: E402
from ops_cases import FLOAT32, make  # noqa: E402
from rocmforge import hip, ops  # noqa: E402
from rocmforge.integrations import torch as rt  # noqa: E402

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
THEIRS = Exchange.from_address(
    _pointer(torch.Tensor.__dlpack_c_exchange_api__, b"dlpack_exchange_api")
)
OURS = Exchange.from_buffer_copy(THEIRS)


@Describe
def describe(tensor, out):
    status = THEIRS.describe(tensor, out)
    out[0].device_type, out[0].device_id = ROCM, 0
    return status


@Stream
def current_stream(_, index, out):
    out[0] = STREAMS[index]
    return 0


OURS.describe, OURS.current_stream = describe, current_stream
DEVICE = hip.get_device(0)
CURRENT, OTHER = hip.Stream(DEVICE), hip.Stream(DEVICE)
STREAMS = {0: CURRENT.__cuda_stream__()[1]}


@pytest.fixture(autouse=True)
def rocm(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "__dlpack_c_exchange_api__", capsule(OURS))
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=STREAMS[0])
    )
    # PyTorch for CPUs cannot take what is on ROCm: it is copied
    monkeypatch.setattr(torch, "from_dlpack", lambda x: torch.from_numpy(x.numpy(CURRENT)))


def tensors(problem):
    names = ("query", "k_cache", "v_cache", "block_table", "seq_lens", "cu_seqlens_q")
    return problem.but(**{name: torch.from_numpy(getattr(problem, name)) for name in names})


@pytest.fixture
def problem():
    return make(FLOAT32, [40, 3, 17], [2, 1, 5], heads=(6, 2), head_dim=64)


def test_attention_is_work_of_the_current_stream(problem):
    want, want_lse = problem.call(ops.paged_attention, return_lse=True)
    given = tensors(problem)
    out = torch.full(want.shape, 7.0)
    assert given.call(rt.paged_attention, out=out) is out
    hip.synchronize(None, DEVICE)
    hip.synchronize(OTHER, DEVICE)
    assert (out == 7).all()  # it was given to no other stream
    hip.synchronize(CURRENT, DEVICE)
    np.testing.assert_allclose(out.numpy(), want, rtol=2e-6, atol=2e-6)
    made, lse = given.call(rt.paged_attention, return_lse=True)
    assert type(made) is type(lse) is torch.Tensor
    np.testing.assert_allclose(made.numpy(), want, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(lse.numpy(), want_lse, rtol=2e-6, atol=5e-6)
    arrays = (given.query, given.k_cache, given.v_cache, given.block_table, given.seq_lens)
    made, lse = torch.ops.rocmforge.paged_attention(*arrays, given.cu_seqlens_q)
    np.testing.assert_allclose(made.numpy(), want, rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(lse.numpy(), want_lse, rtol=2e-6, atol=5e-6)


@pytest.mark.parametrize("module", [rt, torch.ops.rocmforge], ids=["eager", "operator"])
def test_writes_and_blocks_are_work_of_the_current_stream(module):
    key, value = torch.randn(2, 3, 2, 16)
    slots = torch.tensor([0, 9, 4])
    caches = [torch.zeros(4, 2, 4, 16) for _ in "kv"]
    ids, swapped, copies = torch.tensor([[2, 1], [1, 2], [2, 3]], dtype=torch.int32)
    copies = copies[None]
    module.write_kv(key, value, *caches, slots)
    module.copy_blocks(caches, copies)
    hip.synchronize(None, DEVICE)
    assert not caches[0].any()
    rows = module.gather_blocks(caches, ids)  # waits
    assert type(rows) is torch.Tensor
    assert caches[0][2, 0, 1].equal(key[1, 0])
    assert caches[1][3].equal(caches[1][2])
    assert rows[0].numpy().tobytes() == b"".join(cache[2].numpy().tobytes() for cache in caches)
    module.scatter_blocks(caches, swapped, rows)
    assert caches[0][2, 0, 1].equal(key[1, 0])
    hip.synchronize(CURRENT, DEVICE)
    assert caches[0][1, 0, 1].equal(key[1, 0])
    lse = torch.zeros(3, 2)
    out, merged = module.merge_states(key, lse, key, lse)
    assert torch.allclose(out, key)
    assert torch.allclose(merged, torch.full((3, 2), np.log(2), dtype=torch.float32))


def test_another_stream_that_is_asked_for(problem):
    """Is the one: and PyTorch, asked to let it wait for its own, says that it has none."""
    with pytest.raises(AssertionError, match="stream should be None on cpu"):
        tensors(problem).call(rt.paged_attention, stream=OTHER)
