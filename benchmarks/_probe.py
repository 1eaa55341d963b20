"""The machine's own limits, measured by a small C program beside what is benchmarked."""

import ctypes
import mmap
import os
import pathlib
import shutil
import subprocess
import tempfile

import numpy as np

_DOUBLE, _INT, _LONG, _POINTER = ctypes.c_double, ctypes.c_int, ctypes.c_int64, ctypes.c_void_p


def _address(array: np.ndarray) -> int:
    return array.ctypes.data


def aligned_zeros(nbytes: int) -> np.ndarray:
    """Bytes on larger pages where the system has them, aligned to 2 MiB."""
    size = 2 << 20
    memory = mmap.mmap(-1, nbytes + size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    return whole[-_address(whole) % size :][:nbytes]


class Probe:
    """What a bare read, copy or multiply-add takes. The best of several ways is the limit."""

    SEQUENTIAL = ("plain", "unrolled", "prefetched near", "prefetched far")
    PAGED = (
        "plain",
        "the next block into the first level",
        "the next block into the second level",
        "16 KiB ahead into the second level",
        "four places of the next block in turn into the second level",
        "the same, and before it a line of each page of what comes next",
    )

    def __init__(self) -> None:
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            raise RuntimeError("the probes need a C compiler: cc, gcc or clang")
        source = pathlib.Path(__file__).with_name("_probe.c")
        with tempfile.TemporaryDirectory() as folder:
            library = pathlib.Path(folder) / "probe.so"
            flags = ["-O3", "-march=native", "-shared", "-fPIC", "-pthread", "-Wno-psabi"]
            subprocess.run([compiler, *flags, str(source), "-o", str(library)], check=True)
            self._c = ctypes.CDLL(str(library))
        for name, arguments in {
            "probe_sequential": [_POINTER, _LONG, _INT, _INT],
            "probe_paged": [_POINTER, _POINTER, _POINTER, _LONG, _LONG, _INT, _INT],
            "probe_copy": [_POINTER, _POINTER, _LONG, _INT, _INT],
            "probe_multiply_add": [_LONG, _INT, ctypes.POINTER(_DOUBLE)],
            "probe_dot": [_LONG, _INT, ctypes.POINTER(_DOUBLE)],
        }.items():
            function = getattr(self._c, name)
            function.restype, function.argtypes = _DOUBLE, arguments
        if hasattr(os, "sched_getaffinity"):  # one thread on each processor
            processors = sorted(os.sched_getaffinity(0))
            self._c.probe_bind((_INT * len(processors))(*processors), len(processors))

    def sequential(self, array: np.ndarray, threads: int, how: int) -> float:
        """Seconds of reading an array from end to end; how: one of SEQUENTIAL."""
        return self._c.probe_sequential(_address(array), array.nbytes, threads, how)

    def paged(
        self, keys: np.ndarray, values: np.ndarray, blocks: np.ndarray, threads: int, how: int
    ) -> float:
        """Seconds of reading these blocks of keys and values in this order; how: one of PAGED."""
        block_bytes = keys.nbytes // len(keys)
        addresses = _address(keys), _address(values), _address(blocks)
        return self._c.probe_paged(*addresses, blocks.size, block_bytes, threads, how)

    def copy(self, source: np.ndarray, target: np.ndarray, threads: int) -> float:
        """Bytes a second copied, counted once."""
        arguments = _address(source), _address(target), source.nbytes, threads
        return source.nbytes / min(self._c.probe_copy(*arguments, how) for how in range(2))

    def multiply_add(self, threads: int) -> float:
        """Float32 operations a second, two for each multiply-add."""
        flops = _DOUBLE()
        seconds = self._c.probe_multiply_add(2_000_000, threads, ctypes.byref(flops))
        return flops.value / seconds

    @property
    def has_dot(self) -> bool:
        """Whether the processor has dot products of bfloat16 pairs."""
        return self._c.probe_dot(0, 1, ctypes.byref(_DOUBLE())) >= 0

    def dot(self, threads: int) -> float:
        """Operations a second in dot products of bfloat16 pairs, four for each pair and sum."""
        flops = _DOUBLE()
        seconds = self._c.probe_dot(2_000_000, threads, ctypes.byref(flops))
        return flops.value / seconds
