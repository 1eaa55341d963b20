"""paged_attention against the float64 oracle, for every instruction set this machine runs."""

import numpy as np
import pytest

from ops_cases import BFLOAT16, DTYPES, FLOAT16, FLOAT32, make
from rocmforge import reference
from rocmforge.ops import _cpu, paged_attention

# Largest error allowed: absolute, and relative to the result. Sums and softmax are float32, so the
# 16-bit types are off by their final rounding (half a unit in the last place: 2^-11, 2^-8 + slack).
TOLERANCE = {
    FLOAT32: (2e-6, 2e-6),
    FLOAT16: (2e-6, 2.0**-11 * 1.01),
    BFLOAT16: (2e-6, 2.0**-8 * 1.01),
}


@pytest.fixture(params=_cpu.available_isas(), autouse=True)
def isa(request):
    before = _cpu.isa()
    _cpu._set_isa(request.param)
    yield request.param
    _cpu._set_isa(before)


def check(problem, **kwargs):
    got = paged_attention(*problem.arguments(), layout=problem.layout, **kwargs)
    want = reference.paged_attention(*problem.arguments(), layout=problem.layout, **kwargs)
    assert got.dtype == problem.query.dtype
    atol, rtol = TOLERANCE[got.dtype]
    np.testing.assert_allclose(got.astype(np.float64), want, atol=atol, rtol=rtol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 24, 64, 80, 128, 256])
@pytest.mark.parametrize("block_size", [1, 7, 16])
def test_decode(dtype, head_dim, block_size):
    check(make(dtype, contexts=[0, 1, 15, 16, 17, 300], head_dim=head_dim, block_size=block_size))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_ragged(dtype, causal):
    problem = make(dtype, contexts=[40, 1, 0, 17, 600], queries=[40, 1, 0, 3, 100], layout="NHD")
    check(problem, causal=causal)
