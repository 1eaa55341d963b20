"""``x @ weight.T`` for a few rows of `x`, at close to the cost of reading `weight` once.

A decode step multiplies two to sixteen rows by every matrix of the model: there is next to nothing
to compute, and time goes where the memory traffic goes. A BLAS made for large products first copies
the weight into its own packed order, more traffic than the product itself. OpenBLAS, which NumPy's
wheels carry, leaves the packing out when the product is small (M N K up to 10**6, on CPUs with
AVX-512), so the weight is handed to it in pieces that are; those run on one thread each, so the
pieces are dealt to as many threads as there are. NumPy releases the lock of the interpreter inside
a product.

Tried with SmolLM2-135M (538 MB in float32), 4 rows, 2 cores (Xeon with AVX-512, 27 GB/s of
reading), milliseconds for all matrices, the best of nine runs:

====================================================  ====
``x @ w.T``                                            65
``w @ x.T``                                            45
``x @ wt``, weights stored transposed                  48
a matrix-vector product for each row                   49
the same, piece by piece (pieces stay in the cache)    48
pieces of 96 rows, one thread                          48
pieces of 96 rows, two threads (this file)             33
reading the weights once, two threads                  20
====================================================  ====

One row goes straight to a matrix-vector product, which is already as fast as memory, and many rows
(prefill) to the ordinary product, where packing pays.
"""

import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

__all__ = ["Linear", "Threads"]

Matrix = npt.NDArray[np.float32]

MAX_ROWS = 16  # of x: more, and the ordinary product is as fast
PIECE_ELEMENTS = 96 * 576  # of the weight: 16 rows of x keep M N K below 10**6
SHARED_BYTES = 3_000_000  # a smaller weight is read before a second thread is awake


class Threads:
    """A few threads that run one function at the same time, with little delay.

    Handing over through a lock and back takes 7 us here, through ``concurrent.futures`` 65 us; a
    decode step hands over 120 times.
    """

    def __init__(self, count: int) -> None:
        self.count = max(1, count)
        self._function: Callable[[int], None] = _nothing
        self._errors: list[BaseException] = []
        self._gates = [(threading.Lock(), threading.Lock()) for _ in range(self.count - 1)]
        self._threads = []
        for part, (start, done) in enumerate(self._gates, start=1):
            start.acquire()
            done.acquire()
            thread = threading.Thread(target=self._serve, args=(part, start, done), daemon=True)
            thread.start()
            self._threads.append(thread)

    def _serve(self, part: int, start: threading.Lock, done: threading.Lock) -> None:
        while True:
            start.acquire()
            if self._function is _stop:
                return
            try:
                self._function(part)
            except BaseException as error:
                self._errors.append(error)
            done.release()

    def run(self, function: Callable[[int], None]) -> None:
        """Call ``function(part)`` for each part, 0 .. count-1, and wait until all have returned."""
        self._function = function
        for start, _ in self._gates:
            start.release()
        try:
            function(0)
        finally:
            for _, done in self._gates:
                done.acquire()
        if self._errors:
            error = self._errors[0]
            self._errors = []
            raise error

    def close(self) -> None:
        """End the threads; closing twice does nothing."""
        self._function = _stop
        for start, _ in self._gates:
            start.release()
        for thread in self._threads:
            thread.join()
        self._gates, self._threads = [], []


def _nothing(part: int) -> None:
    """Stand where no function was given yet."""


def _stop(part: int) -> None:
    """Tell a thread to return; never called."""


class Linear:
    """Multiplies by weights ``[out, in]``.

    The result depends on the shapes and the machine's BLAS alone, not on the number of threads of
    `threads`, as the pieces are always the same.
    """

    def __init__(self, threads: Threads) -> None:
        self._threads = threads

    def __call__(self, x: Matrix, weight: Matrix) -> Matrix:
        """Give ``x @ weight.T``: float32 ``[rows, in]`` times ``[out, in]`` is ``[rows, out]``."""
        rows = len(x)
        num_out, num_in = weight.shape
        piece = max(16, PIECE_ELEMENTS // num_in // 16 * 16)
        pieces = num_out // piece
        if not 1 < rows <= MAX_ROWS or pieces < 2:
            return x @ weight.T
        whole = pieces * piece
        out = np.empty((rows, num_out), np.float32)
        # [pieces, in, piece] and [pieces, rows, piece]: views, nothing is copied
        weights = weight[:whole].reshape(pieces, piece, num_in).transpose(0, 2, 1)
        results = out[:, :whole].reshape(rows, pieces, piece).transpose(1, 0, 2)
        if weight.nbytes < SHARED_BYTES:
            np.matmul(x, weights, out=results)
        else:
            self._share(x, weights, results)
        if whole < num_out:
            np.matmul(x, weight[whole:].T, out=out[:, whole:])
        return out

    def _share(self, x: Matrix, weights: Matrix, results: Matrix) -> None:
        pieces, count = len(weights), self._threads.count

        def multiply(part: int) -> None:
            mine = slice(pieces * part // count, pieces * (part + 1) // count)
            np.matmul(x, weights[mine], out=results[mine])

        self._threads.run(multiply)
