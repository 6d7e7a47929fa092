"""What a layer's operations keep for the backward pass and hold while it runs, read from model/. Needs no torch.

layer_operations(model, "M")[-1].keeps   # bytes a token; in the order of the forward pass

The kernels are those of model/fused.py on Hopper and newer GPUs; older ones' attention holds more while it runs
backward. tests/test_kept.py counts the bytes that autograd keeps of these kernels and that their backward passes
allocate.
"""

from dataclasses import dataclass

from model.config import FP8_MULTIPLE

STATES_EVERY = 64  # tokens between two states that the scan's backward pass starts from (model/scan.py)
ROWS_ADDED_UP = 64  # by a program of model/convolution.py and model/gated_norm.py


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A node of autograd's graph."""

    # fmt: off
    name: str
    keeps: float = 0      # bytes a token of the forward pass, until it has run backward
    copies: int = 0       # bytes of its weights that are kept beside them, in 8 bits
    takes: float          # bytes a token of the gradients that are there when it begins, also of those that wait
    gives: float          # bytes a token of the gradients that it makes
    work: float = 0       # bytes a token that it holds besides
    parameters: int = 0   # whose gradient it makes
    # fmt: on


def layer_operations(model, kind, *, element=2, fp8=False):
    """A layer's operations. element: bytes of an activation."""
    mixer = mamba_operations if kind == "M" else attention_operations
    return mixer(model, element, fp8) + (mlp_operations(model, element, fp8) if model.d_ff else [])


def norm(model, element):
    """The residual stream and a scale a row are kept; both gradients that reach the stream become one."""
    stream = element * model.d_model
    return Operation(name="norm", keeps=stream + 4, takes=2 * stream, gives=stream, parameters=model.d_model)


def product(model, name, d_in, widths, element, fp8, keeps=True):
    """A product with one or several weights. keeps: whether its input is kept by nothing else."""
    stream, d_out = element * model.d_model, sum(widths)
    n = d_in * d_out
    takes = stream + (element * d_out if name == "in_proj" else 0)  # out_proj's is the stream's gradient itself
    node = {"name": name, "takes": takes, "gives": element * d_in, "parameters": n}
    if in_8_bits(fp8, d_in, *widths):  # input and weights turned; the gradient is cast by rows and by columns
        return Operation(**node, keeps=d_in, copies=n, work=2 * d_out)
    return Operation(**node, keeps=element * d_in if keeps else 0)


def in_8_bits(fp8, *widths):
    return fp8 and not any(width % FP8_MULTIPLE for width in widths)


def mamba_operations(model, element, fp8):
    d_inner, bc, heads = model.d_inner, model.n_groups * model.d_state, model.n_mamba_heads
    widths, conv = [d_inner, d_inner, bc, bc, heads], model.d_conv_channels
    mixer = Operation(
        name="mixer",
        # in_proj's product, the convolution's output, the scan's; the gated norm's scales; where documents begin
        keeps=element * (sum(widths) + conv + d_inner) + 4 * model.n_groups + 4,
        takes=element * (model.d_model + d_inner), gives=element * sum(widths),
        # all of it together (model/launching.py): gradients of the scan's and the convolution's outputs; a state and
        # its gradient for each chunk; in float32 step sizes, decays and sums over each chunk's pairs, by head, C's
        # gradient in two parts, and parts of the gradients of the convolution's and the gated norm's weights
        work=element * (d_inner + conv + 2 * d_inner * model.d_state // STATES_EVERY) + 40 * heads + 8 * bc
        + 4 * ((model.d_conv + 1) * conv + d_inner) / ROWS_ADDED_UP,
        parameters=conv * (model.d_conv + 1) + 3 * heads + d_inner,
    )  # fmt: skip
    return [
        norm(model, element),
        product(model, "in_proj", model.d_model, widths, element, fp8),
        mixer,
        product(model, "out_proj", d_inner, [model.d_model], element, fp8),
    ]


def attention_operations(model, element, fp8):
    d, d_kv, heads, gated = model.d_model, model.n_kv_heads * model.head_dim, model.n_heads, model.attention_gate
    widths = [d, d_kv, d_kv] + ([d] if gated else [])
    columns, stream = sum(widths), element * d
    turned = d + d_kv if model.positions == "rope" or model.qk_norm else 0  # q and k, where they are not in_proj's
    scales = 4 * (heads + model.n_kv_heads) if model.qk_norm else 0
    attention = Operation(
        name="attention",
        keeps=element * (columns + turned + d) + 4 * heads + scales,  # in_proj's product, q, k, y and log-sums
        takes=(3 if gated else 2) * stream, gives=element * (d + 2 * d_kv),
        work=4 * heads,  # products of y and its gradient
    )  # fmt: skip
    operations = [norm(model, element), product(model, "in_proj", d, widths, element, fp8)]
    if not in_8_bits(fp8, d, *widths):  # the parts' gradients are laid side by side
        takes = stream + element * columns
        operations.append(Operation(name="split", takes=takes, gives=element * columns))
    operations.append(attention)
    if gated:
        operations.append(Operation(name="gate", takes=2 * stream, gives=2 * stream))
    return [*operations, product(model, "out_proj", d, [d], element, fp8, keeps=gated)]


def mlp_operations(model, element, fp8):
    d, d_ff = model.d_model, model.d_ff
    stream = element * d
    if in_8_bits(fp8, d, d_ff):  # model/fp8.py's SwiGLUProduct, one operation
        fused = Operation(
            name="swiglu", keeps=d + 2 * element * d_ff, copies=3 * d * d_ff, takes=stream, gives=stream,
            # dy by rows and columns; h's gradient, h by columns, and the gradient of gate and up by rows and columns
            work=2 * d + (element + 1 + 4) * d_ff, parameters=3 * d * d_ff,
        )  # fmt: skip
        return [norm(model, element), fused]
    gating = Operation(
        name="swiglu", keeps=2 * element * d_ff, takes=stream + element * d_ff, gives=2 * element * d_ff
    )
    return [
        norm(model, element),
        product(model, "in_proj", d, [d_ff, d_ff], element, fp8),
        gating,
        product(model, "out_proj", d_ff, [d], element, fp8),
    ]
