"""The scan's kernels equal their plain twin and keep documents apart; run on the CPU by Triton's interpreter, which
checks what they compute, not that they compile (tests/test_gpu.py does)."""

import interpreted  # noqa: F401  # before any kernel
import pytest
import torch

from model import reference
from model.scan import Plan, decays, document_starts, entering_states, plan_for, scan, ssd

# of the largest value. float32: sums in another order; bfloat16: some roundings of 2^-9 in products and states
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2}
CHUNK = 32
PLANS = [Plan(CHUNK, block_p=16, copies=copies) for copies in (True, False)]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def inputs(b=2, l=70, h=4, p=16, g=2, n=16, dtype=torch.float32):
    x, B, C = (draw(*shape, seed=i).to(dtype) for i, shape in enumerate([(b, l, h, p), (b, l, g, n), (b, l, g, n)]))
    return x, draw(b, l, h, seed=3).sigmoid() / 10, -draw(h, seed=4).exp() * 4, B, C, draw(h, seed=5)


def documents(l, *rows):
    """The documents of rows in which they start at these places, and at 0."""
    return torch.stack(
        [sum(((torch.arange(l) >= start).int() for start in row), torch.zeros(l)).int() for row in rows]
    )


def assert_near(got, want, dtype):
    torch.testing.assert_close(got.float(), want, rtol=0, atol=TOLERANCE[dtype] * want.abs().max().item())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("l", [1, 33, 70])
@pytest.mark.parametrize("plan", PLANS)
def test_scan_equals_its_twin(l, packed, dtype, plan):
    ids = documents(l, [1, 20, 32, 40], [31, 64]) if packed else None
    for g, p, n, start in ((1, 24, 48, True), (2, 16, 8, False)):
        x, dt, A, B, C, D = inputs(l=l, p=p, g=g, n=n, dtype=dtype)
        start = draw(2, 4, n, p, seed=6) if start else None
        got = scan(x, dt, A, B, C, D, ids, start, plan)
        want = reference.ssd(x.float(), dt, A, B.float(), C.float(), D, 16, ids, start)
        assert got[0].dtype == dtype and got[1].dtype == torch.float32
        for ours, twins in zip(got, want, strict=True):
            assert_near(ours, twins, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("plan", PLANS)
def test_what_enters_a_chunk_is_the_last_state_of_the_row_before_it(packed, dtype, plan):
    l = 70
    ids = documents(l, [1, 20, 32, 40], [31, 64]) if packed else None
    x, dt, A, B, C, D = inputs(l=l, p=24, g=1, n=48, dtype=dtype)
    start = draw(2, 4, 48, 24, seed=6)
    got = entering_states(x, B, *decays(dt, A, CHUNK, ids), ids, start, plan)
    assert got.dtype == dtype and got.shape == (2, 3, 4, 24, 48)
    assert_near(got[:, 0].mT, start, dtype)
    for c in (1, 2):
        before = [t[:, : c * CHUNK].float() for t in (x, dt, B, C)]
        x_, dt_, B_, C_ = before
        _, want = reference.ssd(x_, dt_, A, B_, C_, D, 16, None if ids is None else ids[:, : c * CHUNK], start)
        assert_near(got[:, c].mT, want, dtype)


@pytest.mark.filterwarnings("ignore:overflow")  # of what is masked
@pytest.mark.parametrize("plan", PLANS)
def test_a_document_leaves_no_trace_in_the_next(plan):
    x, dt, A, B, C, D = inputs(b=1)
    for start in (20, 32, 40):
        ids = documents(70, [start])
        others = [torch.cat([100 * draw(*t[:, :start].shape, seed=9), t[:, start:]], dim=1) for t in (x, B, C)]
        other_dt = torch.cat([dt[:, :start].flip(1) * 300, dt[:, start:]], dim=1)
        states = [None, draw(1, 4, 16, 16)]
        y, last = scan(x, dt, A, B, C, D, ids, states[0], plan)
        changed_y, changed_last = scan(others[0], other_dt, A, *others[1:], D, ids, states[1], plan)
        assert not torch.equal(y[:, :start], changed_y[:, :start])
        assert torch.equal(y[:, start:], changed_y[:, start:]) and torch.equal(last, changed_last)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("wanted", [1, 2])  # gradients of y alone, and of the last state too
def test_gradients_are_those_of_the_twin(wanted, dtype):
    l = 131  # a chunk of the backward pass, and a bit
    ids = documents(l, [1, 128]) if wanted == 2 else None
    tensors = [*inputs(b=1, l=l, h=2, g=1, dtype=dtype), draw(1, 2, 16, 16, seed=6)]
    seeds = [draw(1, l, 2, 16, seed=7).to(dtype), draw(1, 2, 16, 16, seed=8)][:wanted]

    def gradients(function, tensors):
        tensors = [t.clone().requires_grad_() for t in tensors]
        outputs = function(*tensors[:-1], 64, ids, tensors[-1])[:wanted]
        return torch.autograd.grad(outputs, tensors, [s.to(y) for s, y in zip(seeds, outputs, strict=True)])

    for got, want in zip(gradients(ssd, tensors), gradients(reference.ssd, [t.float() for t in tensors]), strict=True):
        torch.testing.assert_close(got.float(), want, rtol=0, atol=5 * TOLERANCE[dtype] * want.abs().max().item())


def test_slices_of_wider_rows_are_read_in_place():
    x, dt, A, B, C, D = inputs(g=1)
    row = torch.cat([draw(2, 70, 8), x.flatten(2), B.flatten(2), C.flatten(2)], dim=-1)
    _, x_, B_, C_ = row.split([8, 64, 16, 16], dim=-1)
    slices = x_.unflatten(-1, (4, 16)), dt, A, B_.unflatten(-1, (1, 16)), C_.unflatten(-1, (1, 16)), D
    for plan in PLANS:
        want = scan(x, dt, A, B, C, D, plan=plan)
        assert all(torch.equal(*pair) for pair in zip(scan(*slices, plan=plan), want, strict=True))


def test_documents_start_at_their_place_in_the_chunk_or_before_it():
    assert document_starts(torch.tensor([[0, 0, 1, 1, 1, 1, 1, 2, 3], [0, 1, 1, 1, 2, 2, 2, 2, 2]]), 4).tolist() == [
        [[-1, -1, 2, 2], [-1, -1, -1, 3], [0, 0, 0, 0]],
        [[-1, 1, 1, 1], [0, 0, 0, 0], [-1, -1, -1, -1]],
    ]


def test_programs_take_smaller_parts_of_large_states_and_of_few_heads():
    def part(b, h, p, n, chunk=None):
        return plan_for(torch.empty(b, 1, h, p, dtype=torch.bfloat16), n, chunk).block_p

    assert part(8, 64, 64, 128) == part(2, 64, 128, 128) == 64  # 132 multiprocessors, where there is no GPU
    assert part(1, 64, 64, 128) == part(8, 64, 64, 256) == 32
    assert part(1, 64, 64, 128, chunk=64) == 64
    assert part(8, 64, 16, 16) == part(8, 64, 8, 8) == 16
