"""Every feature of attention with every type and every instruction set, against the oracle."""

import functools

import numpy as np
import pytest

from ops_cases import (
    DTYPES,
    EIGHT_BIT,
    assert_close,
    assert_lse_close,
    make,
    pairwise,
    tree_mask,
)
from rocmforge.ops import _cpu, paged_attention

ISAS = _cpu.available_isas()


@pytest.fixture(params=ISAS)
def isa(request):
    before = _cpu.isa()
    _cpu._set_isa(request.param)
    yield request.param
    _cpu._set_isa(before)


TYPES = [(dtype, dtype) for dtype in DTYPES] + [(q, kv) for q in DTYPES for kv in EIGHT_BIT]
BATCHES = {
    "decode": ([0, 1, 31, 33, 257, 530], None),
    "verify": ([4, 40, 300, 9], [4, 3, 4, 0]),
    "prefill": ([70, 33], [70, 33]),
    "ragged": ([70, 1, 0, 40, 300, 290, 5, 0], [70, 1, 0, 1, 4, 33, 5, 2]),
}
GRID = pairwise(
    types=TYPES,
    batch=sorted(BATCHES),
    heads=[(1, 1), (6, 3), (8, 1), (12, 2), (40, 2)],
    dims=[(64, 64), (128, 128), (8, 32), (80, 24), (192, 128), (256, 8)],
    block_size=[1, 7, 16, 64],
    layout=["HND", "NHD"],
    scales=["token", "head", "scalar"],
    causal=[True, False],
    window=[(-1, -1), (0, 0), (20, -1), (-1, 3), (45, 7)],
    softcap=[0.0, 1.5, 50.0],
    alibi=[False, True],
    sinks=[False, True],
    mask=[False, True],
    holes=[0.0, 0.3],
)


@functools.cache
def row(index):
    """A problem of the grid with what the oracle makes of it."""
    case = GRID[index]
    contexts, queries = BATCHES[case["batch"]]
    problem = make(
        case["types"][0],
        contexts,
        queries,
        kv_dtype=case["types"][1],
        scales=case["scales"],
        heads=case["heads"],
        head_dim=case["dims"][0],
        v_head_dim=case["dims"][1],
        block_size=case["block_size"],
        layout=case["layout"],
        holes=case["holes"],
        seed=index,
    )
    rng = np.random.default_rng(index)
    num_heads = case["heads"][0]
    options = {
        "causal": case["causal"],
        "window_size": case["window"],
        "softcap": case["softcap"],
        "alibi_slopes": None,
        "sinks": None,
    }
    if case["alibi"]:
        options["alibi_slopes"] = rng.uniform(-0.1, 0.3, num_heads).astype(np.float32)
    if case["sinks"]:
        options["sinks"] = rng.standard_normal(num_heads).astype(np.float32) * 2
    problem = problem.but(options=options)
    if case["mask"]:
        problem = problem.but(mask=tree_mask(problem, index))
    return problem, problem.expected()


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("index", range(len(GRID)))
def test_grid(index):
    problem, (want, want_lse, bound) = row(index)
    got, lse = problem.call(paged_attention, return_lse=True)
    assert got.dtype == problem.query.dtype
    assert_close(got, want, bound)
    assert_lse_close(lse, want_lse)
