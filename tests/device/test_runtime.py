"""Devices, streams, graphs, errors and interchange; and what happens when calls fail."""

from __future__ import annotations

import gc
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from device_cases import attend, on, up
from ops_cases import FLOAT32, bits, make
from rocmforge import hip, ops, reference
from rocmforge.errors import DeviceError
from rocmforge.hip import _driver


def test_devices_say_what_they_are(device, sim):
    arch = os.environ["RF_SIM_DEVICES"].split(",")[device.index]
    assert device.architecture == arch
    assert device.code_object() == arch.partition(":")[0]
    assert device.wave_size == (64 if arch.startswith("gfx9") else 32)
    assert arch in repr(device)
    free, total = device.memory_info()
    assert 0 < free <= total


def test_names_of_devices():
    assert hip.get_device("hip") is hip.get_device(0) is hip.get_device("hip:0")
    with pytest.raises(DeviceError, match="hip:99 is not there"):
        hip.get_device("hip:99")
    for wrong in ("cuda:0", "hip:", "hip:x"):
        with pytest.raises(ValueError, match="device"):
            hip.get_device(wrong)
    with pytest.raises(TypeError, match="device"):
        hip.get_device(1.5)


def test_binding_in_use():
    module, launches = _driver.binding()
    assert module in ("rocm.bindings.cyhip", "hip.chip")
    assert launches == ("Python" if os.environ.get("ROCMFORGE_HIP_NO_CAPSULES") else "C")


def test_an_architecture_without_code_objects(monkeypatch, tmp_path, device):
    monkeypatch.setenv("ROCMFORGE_CODE_OBJECTS", str(tmp_path))
    with pytest.raises(DeviceError, match=r"no code object for gfx.*ROCMFORGE_HIP_ARCHS=gfx"):
        device.code_object()
    for family in ("attention", "write", "merge", "copy"):
        for arch in ("gfx11-generic", "gfx9-4-generic"):
            (tmp_path / f"{family}.{arch}.hsaco").touch()
    assert device.code_object().endswith("generic")
    exact = device.architecture.partition(":")[0]
    for family in ("attention", "write", "merge", "copy"):
        (tmp_path / f"{family}.{exact}.hsaco").touch()
    assert device.code_object() == exact


def test_code_of_another_chip_is_refused(sim, monkeypatch, tmp_path, device):
    """The runtime's own words for it."""
    for family in ("attention", "write", "merge", "copy"):
        name = f"{family}.{device.architecture.partition(':')[0]}.hsaco"
        (tmp_path / name).write_bytes(b"\x7fELF" + bytes(14) + b"\xe0\x00" + bytes(44))
    monkeypatch.setenv("ROCMFORGE_CODE_OBJECTS", str(tmp_path))
    device.release()
    try:
        with pytest.raises(DeviceError, match="hipErrorNoBinaryForGpu: no kernel image"):
            attend(make(FLOAT32, [3]), device)
    finally:
        device.release()


def test_streams_are_independent_and_ordered(sim, device):
    problem = make(FLOAT32, [40, 21], heads=(4, 2))
    want = attend(problem, device)
    one, other = hip.Stream(device), hip.Stream(device)
    moved = on(problem, device)
    hip.synchronize()
    out = hip.zeros(want.shape, FLOAT32, device, one)
    moved.call(ops.paged_attention, out=out, stream=one)
    event = hip.Event(device)
    event.record(one)
    assert not event.query() or event.query()
    copy = hip.empty(want.shape, FLOAT32, device)
    other.wait(event)
    copy.copy_from(out, other)
    assert np.array_equal(bits(copy.numpy(other)), bits(want))
    event.synchronize()
    assert event.query()


def test_a_stream_may_come_in_any_form(device):
    problem = make(FLOAT32, [40, 21], heads=(4, 2))
    moved = on(problem, device)
    hip.synchronize()
    stream = hip.Stream(device)
    handle = _driver.stream_address(stream)

    class Torch:
        cuda_stream = handle

    class Cupy:
        ptr = handle

    for form in (stream, handle, Torch(), Cupy()):
        assert _driver.stream_address(form) == handle
        moved.call(ops.paged_attention, stream=form)
    assert _driver.stream_address(None) == 0
    with pytest.raises(TypeError, match="stream must be"):
        moved.call(ops.paged_attention, stream="a")
    stream.synchronize()


def test_graph_capture_and_replay_with_changed_contents(device):
    problem = make(FLOAT32, [700, 40, 21], heads=(4, 2))
    moved = on(problem, device)
    size = ops.attention_workspace_size(
        num_seqs=3, num_heads=4, num_kv_heads=2, head_dim=64, max_seq_len=800, device=device
    )
    assert size > 0
    workspace = hip.empty(size, np.uint8, device)
    out = hip.empty((3, 4, 64), FLOAT32, device)
    key = up(np.ones((3, 2, 64), np.float32), device)
    slots = up(np.full(3, -1, np.int64), device)
    attend(problem, device)  # loads the kernels
    ops.write_kv(key, key, moved.k_cache, moved.v_cache, slots)
    hip.synchronize()
    stream = hip.Stream(device)
    stream.begin_capture()
    assert stream.is_capturing()
    ops.write_kv(key, key, moved.k_cache, moved.v_cache, slots, stream=stream)
    moved.call(ops.paged_attention, out=out, workspace=workspace, max_seq_len=800, stream=stream)
    graph = stream.end_capture()
    for lens in ([700, 40, 21], [650, 3, 0], [1, 40, 7]):
        case = problem.but(seq_lens=np.array(lens, np.int32))
        table = problem.block_table.copy()
        table[1, : 40 // 16] = table[1, : 40 // 16][::-1]
        case = case.but(block_table=table)
        moved.seq_lens.copy_from(case.seq_lens, stream)
        moved.block_table.copy_from(case.block_table, stream)
        graph.launch(stream)
        got = out.numpy(stream)
        np.testing.assert_allclose(got, case.call(reference.paged_attention), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("last", [False, True])
def test_threads_on_one_stream(device, merge_by_last, last):
    """They share the stream's scratch memory: nobody's parts are overwritten before the merge."""
    merge_by_last(last)
    problems = [make(FLOAT32, [1100 + 300 * i], heads=(4, 2), seed=i) for i in range(4)]
    wants = [problem.call(reference.paged_attention) for problem in problems]
    moved = [on(problem, device) for problem in problems]
    hip.synchronize()
    interval = sys.getswitchinterval()

    def work(number):
        for _ in range(12):
            got = moved[number].call(ops.paged_attention).numpy()
            np.testing.assert_allclose(got, wants[number], atol=2e-6, rtol=2e-6)

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(interval)


def test_a_workspace_serves_smaller_calls(device):
    """Without determinism a smaller call is cut finer, and may need more than a large one."""
    shape = {"num_heads": 4, "num_kv_heads": 1, "head_dim": 64, "max_seq_len": 8192}
    options = {"deterministic": False, "device": device}
    sizes = [
        ops.attention_workspace_size(num_seqs=n, **shape, **options)
        for n in range(1, 4 * device.compute_units)
    ]
    assert sizes == sorted(sizes)
    workspace = hip.empty(sizes[-1], np.uint8, device)
    for num_seqs in (1, 2, device.compute_units):
        problem = on(make(FLOAT32, [40] * num_seqs, heads=(4, 1)), device)
        bounds = {"workspace": workspace, "max_seq_len": 8192, "deterministic": False}
        problem.call(ops.paged_attention, **bounds)
    hip.synchronize()


def test_a_cache_of_no_blocks_is_refused(device):
    """The kernels read block 0 where a table's entry is masked."""
    problem = on(make(FLOAT32, [3], heads=(4, 2)), device)
    none = hip.empty((0, 2, 16, 64), FLOAT32, device)
    with pytest.raises(ValueError, match="k_cache must have at least one block"):
        problem.but(k_cache=none, v_cache=none).call(ops.paged_attention)


def test_graphs_whose_last_workgroups_merge(device, merge_by_last):
    """In scratch memory that a call before the capture has made, and that calls go on using."""
    merge_by_last(True)
    problem = make(FLOAT32, [700, 40, 21], heads=(4, 2))
    want = {
        lens: problem.but(seq_lens=np.array(lens, np.int32)).call(reference.paged_attention)
        for lens in ((700, 40, 21), (650, 3, 0), (1, 40, 7))
    }
    moved, stream = on(problem, device), hip.Stream(device)
    out = hip.empty((3, 4, 64), FLOAT32, device)
    hip.synchronize()
    moved.call(ops.paged_attention, out=out, num_splits=5, stream=stream)
    stream.begin_capture()
    moved.call(ops.paged_attention, out=out, num_splits=5, stream=stream)
    graph = stream.end_capture()
    for lens in 2 * list(want):
        moved.seq_lens.copy_from(np.array(lens, np.int32), stream)
        graph.launch(stream)
        np.testing.assert_allclose(out.numpy(stream), want[lens], atol=2e-6, rtol=2e-6)
        moved.call(ops.paged_attention, out=out, num_splits=3, stream=stream)
        np.testing.assert_allclose(out.numpy(stream), want[lens], atol=2e-6, rtol=2e-6)


def test_scratch_memory_that_grows_and_streams_that_have_their_own(device, merge_by_last):
    merge_by_last(True)
    device.release()
    streams = [hip.Stream(device) for _ in range(2)]
    for contexts in ([200], [700, 130, 90, 513], [200]):
        problem = make(FLOAT32, contexts, heads=(4, 2))
        want, moved = problem.call(reference.paged_attention), on(problem, device)
        hip.synchronize()
        outs = [
            moved.call(ops.paged_attention, num_splits=splits, stream=stream)
            for splits in (3, 2)
            for stream in streams
        ]
        for out, stream in zip(outs, 2 * streams, strict=True):
            np.testing.assert_allclose(out.numpy(stream), want, atol=2e-6, rtol=2e-6)


def test_scratch_memory_whose_counters_were_not_cleared_is_not_kept(sim, device, merge_by_last):
    merge_by_last(True)
    problem = make(FLOAT32, [200, 90], heads=(4, 2))
    want = attend(problem, device, num_splits=3)
    moved = on(problem, device)
    for call in range(12):
        device.release()
        moved.call(ops.paged_attention, num_splits=1)  # loads the kernel
        sim.fail(call)
        try:
            moved.call(ops.paged_attention, num_splits=3)
        except DeviceError:
            sim.forget_errors()
        sim.fail(-1)
        out = moved.call(ops.paged_attention, num_splits=3)
        assert np.array_equal(out.numpy(), want)


@pytest.mark.parametrize("what", ["allocation", "pageable copy", "synchronisation"])
def test_what_a_capture_refuses(sim, device, what):
    stream = hip.Stream(device)
    array = hip.empty(4, np.int32, device)
    stream.begin_capture()
    refused = {
        "allocation": lambda: hip.empty(4, np.int32, device),
        "pageable copy": lambda: array.copy_from(np.zeros(4, np.int32), stream),
        "synchronisation": lambda: hip.synchronize(stream),
    }[what]
    with pytest.raises(DeviceError, match="hipErrorStreamCaptureUnsupported"):
        refused()
    with pytest.raises(DeviceError, match="hipErrorStreamCaptureInvalidated"):
        stream.end_capture()


def test_nothing_is_allocated_or_waited_for_with_workspace_and_out(sim, device):
    problem = make(FLOAT32, [700, 40], heads=(4, 2))
    moved = on(problem, device)
    out = hip.empty((2, 4, 64), FLOAT32, device)
    workspace = hip.empty(1 << 20, np.uint8, device)
    stream = hip.Stream(device)
    moved.call(ops.paged_attention, out=out, workspace=workspace, stream=stream)
    hip.synchronize(stream)
    live, calls, launches = sim.live(), sim.calls(), sim.launches()
    moved.call(ops.paged_attention, out=out, workspace=workspace, stream=stream)
    assert sim.live() == live
    assert sim.launches() == launches + 2
    # two launches, and for each where the thread is, there and back
    assert sim.calls() - calls <= 8
    hip.synchronize(stream)


def test_workspace_that_is_too_small(device):
    problem = make(FLOAT32, [700, 40], heads=(4, 2))
    with pytest.raises(ValueError, match=r"workspace must have \d+ bytes.*got 100"):
        attend(problem, device, workspace=np.zeros(100, np.uint8))
    with pytest.raises(ValueError, match="workspace must be uint8"):
        attend(problem, device, workspace=np.zeros(100, np.float32))


def test_arrays_in_the_wrong_place(device):
    problem = make(FLOAT32, [40], heads=(4, 2))
    moved = on(problem, device)
    with pytest.raises(ValueError, match=f"k_cache must be on {device}.*host memory"):
        moved.but(k_cache=problem.k_cache).call(ops.paged_attention)
    with pytest.raises(ValueError, match="k_cache must be in host memory"):
        problem.but(k_cache=moved.k_cache).call(ops.paged_attention)
    with pytest.raises(TypeError, match="seq_lens must be an array with __dlpack__"):
        moved.but(seq_lens=[40]).call(ops.paged_attention)
    with pytest.raises(ValueError, match="out must not overlap query"):
        moved.call(ops.paged_attention, out=moved.query)
    with pytest.raises(ValueError, match="seq_lens must be int32"):
        moved.but(seq_lens=up(problem.seq_lens.astype(np.int64), device)).call(ops.paged_attention)
    with pytest.raises(ValueError, match="num_splits"):
        moved.call(ops.paged_attention, num_splits=0)
    with pytest.raises(ValueError, match="num_splits must be at most"):
        moved.call(ops.paged_attention, num_splits=10**6)


def test_devices_do_not_mix():
    if hip.device_count() < 2:
        pytest.skip("one device")
    problem = make(FLOAT32, [40], heads=(4, 2))
    first, second = (on(problem, hip.get_device(i)) for i in range(2))
    with pytest.raises(ValueError, match=r"k_cache must be on hip:0.* on hip:1"):
        first.but(k_cache=second.k_cache).call(ops.paged_attention)
    results = [attend(problem, hip.get_device(i)) for i in (0, 1, 0)]
    np.testing.assert_allclose(results[0], results[1], atol=2e-6)
    assert np.array_equal(bits(results[0]), bits(results[2]))


def test_what_we_export(device):
    array = hip.empty((2, 3), np.float32, device)
    assert array.__dlpack_device__() == (10, device.index)
    for unused in (array.__dlpack__(), array.__dlpack__(max_version=(1, 0))):
        del unused
    with pytest.raises(BufferError, match="without a copy"):
        array.__dlpack__(copy=True)
    with pytest.raises(BufferError, match="not on DLPack device"):
        array.__dlpack__(dl_device=(1, 0))
    with pytest.raises(BufferError, match="no type"):
        hip.empty(2, np.complex64, device).__dlpack__()


def test_out_of_memory_says_how_much(sim, device):
    gc.collect()
    live = sim.live()
    with pytest.raises(
        DeviceError, match=r"hipMalloc: 4294967296 bytes of device memory on hip:\d"
    ):
        hip.empty(1 << 32, np.uint8, device)
    with pytest.raises(DeviceError, match=r"of 1073741824 free\): hipErrorOutOfMemory"):
        hip.empty(1 << 32, np.uint8, device)
    assert sim.live() == live


def test_memory_is_given_back(sim, device):
    problem = make(FLOAT32, [40, 21], heads=(4, 2))
    attend(problem, device)
    gc.collect()
    live = sim.live()
    for _ in range(3):
        attend(problem, device)
        stream, event = hip.Stream(device), hip.Event(device)
        del stream, event
    gc.collect()
    assert sim.live() == live


def test_every_call_may_fail(sim, device):
    """Whichever HIP call fails: DeviceError with HIP's name for it, nothing leaks, all goes on."""
    problem = make(FLOAT32, [700, 40], [1, 3], heads=(4, 2))
    want = attend(problem, device)

    def everything():
        moved = on(problem, device)
        stream = hip.Stream(device)
        hip.synchronize()
        out, lse = moved.call(ops.paged_attention, return_lse=True, stream=stream)
        ops.copy_blocks(moved.k_cache, np.array([[0, 1]], np.int32), stream=stream)
        ops.merge_states(out, lse, out, lse, stream=stream)
        return out.numpy(stream)

    device.release()
    before = sim.calls()
    everything()
    total = sim.calls() - before
    assert total > 20
    device.release()
    gc.collect()
    live = sim.live()
    failures = 0
    for n in range(total):
        sim.set_device(0)  # where the calls begin, whatever failed before
        sim.fail(n)
        try:
            everything()
        except DeviceError as error:
            failures += "hipErrorLaunchFailure: unspecified launch failure" in str(error)
        sim.fail(-1)
        gc.collect()
        device.release()
        assert sim.live() == live, n
    assert failures == total
    assert np.array_equal(bits(attend(problem, device)), bits(want))


def test_lanes_in_any_order(sim, device):
    problem = make(FLOAT32, [300, 40, 33], [1, 40, 5], heads=(8, 2))
    want = attend(problem, device, num_splits=3)
    for seed in (1, 2, 3):
        sim.set_seed(seed)
        assert np.array_equal(bits(attend(problem, device, num_splits=3)), bits(want))
