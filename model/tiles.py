"""How a Triton kernel reads and writes a tensor: by rows, or in tiles by the GPU's copy engine or, where it cannot, by
pointers."""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

# ptxas 12.8, which Triton 3.6 takes for GPUs before Blackwell, has tensor cores read the wrong shared memory in some
# kernels: in a walk of one chunk, or in float32 with p = n = 16. The 12.9 that it takes for Blackwell does not.
if triton.knobs.nvidia.ptxas.version == "12.8":
    triton.knobs.nvidia.ptxas = triton.knobs.nvidia.ptxas_blackwell.path


def by_rows(x):
    """x, copied only if neighbours in its last dimension do not lie side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def in_rows(x):
    """x (..., d) as (rows, d), copied only where the distance from row to row is not always the same."""
    return by_rows(x).reshape(-1, x.shape[-1])


def has_copy_engine(device):
    """Hopper and newer; the interpreter on the CPU plays it."""
    return device.type != "cuda" or torch.cuda.get_device_properties(device).major >= 9


def tiles(tensor, rows, columns, copies=True, heads=1):
    """A tensor of four dimensions in tiles of its last two, as load_tile takes it: what it is, and its strides.

    copies: by the copy engine, where the strides are whole multiples of 16 bytes; then there are no strides.
    heads: how many neighbours in the second dimension a tile has, one below the other.
    """
    each = 16 // tensor.element_size()
    if tensor.stride(-1) != 1:
        raise ValueError(f"the last dimension is not contiguous: strides {tensor.stride()}")
    even = not (tensor.data_ptr() % 16 or any(stride % each for stride in tensor.stride()[:-1]))
    if copies and even:
        return TensorDescriptor.from_tensor(tensor, [1, heads, rows, columns]), None
    return tensor, tensor.stride()[:3]


@triton.jit
def load_tile(
    tensor, strides, b, i, row, column, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HEADS: tl.constexpr = 1,
):  # fmt: skip
    """Rows from `row` and columns from `column` of tensor[b, i], zeros beyond its height and width.

    HEADS: of tensor[b, i : i + HEADS], (HEADS * ROWS, COLUMNS).
    """
    if strides is None:
        tile = tensor.load([b, i, row, column]).reshape(HEADS * ROWS, COLUMNS)
    else:
        at, inside = _places(strides, b, i, row, column, height, width, ROWS, COLUMNS, HEADS)
        tile = tl.load(tensor + at, mask=inside, other=0.0)
    return tile


@triton.jit
def store_tile(
    tensor, strides, b, i, row, column, height, width, tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    HEADS: tl.constexpr = 1,
):  # fmt: skip
    if strides is None:
        tensor.store([b, i, row, column], tile.reshape(1, HEADS, ROWS, COLUMNS))
    else:
        at, inside = _places(strides, b, i, row, column, height, width, ROWS, COLUMNS, HEADS)
        tl.store(tensor + at, tile, mask=inside)


@triton.jit
def _places(
    strides, b, i, row, column, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HEADS: tl.constexpr
):  # fmt: skip
    rows, columns = tl.arange(0, HEADS * ROWS), tl.arange(0, COLUMNS)
    start = tl.cast(b, tl.int64) * strides[0] + tl.cast(i, tl.int64) * strides[1] + tl.cast(row, tl.int64) * strides[2]
    if HEADS > 1:
        start += rows[:, None] // ROWS * strides[1].to(tl.int64)
        rows = rows % ROWS
    inside = (row + rows < height)[:, None] & (column + columns < width)[None, :]
    return start + column + (rows[:, None] * strides[2] + columns[None, :]), inside
