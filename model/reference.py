"""The model's operations in plain PyTorch: the truth that every faster version is tested against.

Dimensions: b batch, l length, h heads, p channels of a head, g groups, n state, c chunks, q positions of a chunk,
k key/value heads. `document_ids` (b, l) numbers the documents packed into a row 0, 1, 2 ... (layers.Packing).
Nothing crosses from one document to the next: what is masked is exactly zero, forward and backward.
"""

import torch
import torch.nn.functional as F
from einops import rearrange

IGNORED_TARGET = -100  # a target that cross_entropy leaves out
FEW_ROWS = 256  # tokens for which `products` one by one cost less than to copy its weights together
# PyTorch gives float32 products on a CPU to MKL, which leaves the wider half of an AMD processor's vector units idle;
# oneDNN, which PyTorch has with it, uses them (BENCHMARKS.md).
ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear(x, weight):
    """x (..., k) times weight^T, (n, k): (..., n)."""
    on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    if ONEDNN and on_cpu and x.numel() > x.shape[-1] and not torch.compiler.is_compiling():
        return OneDNNLinear.apply(x, weight)
    return F.linear(x, weight)


def products(x, weights):
    """x (..., k) times each of the weights (n, k), transposed, side by side: (..., sum of n)."""
    if len(weights) == 1:
        return linear(x, weights[0])
    if not torch.is_grad_enabled() and x.shape[:-1].numel() <= FEW_ROWS:
        return torch.cat([linear(x, weight) for weight in weights], dim=-1)
    return linear(x, torch.cat(weights))


class OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return _onednn_product(x, weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1])
        dx = _onednn_product(dy, weight.T) if ctx.needs_input_grad[0] else None
        return dx, _onednn_product(rows.T, x.reshape(-1, x.shape[-1]).T) if ctx.needs_input_grad[1] else None


def _onednn_product(x, weight):
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def causal_conv1d(x, weight, bias, document_ids=None, initial_state=None):
    """Depthwise causal convolution, then SiLU.

    x (b, l, d); weight (d, w); bias (d,). initial_state (b, w - 1, d) holds the inputs before x, of the first
    document (zeros if None).
    Returns y (b, l, d) and the last w - 1 inputs, (b, w - 1, d), from which a next call goes on.
    """
    b, l, d = x.shape
    width = weight.shape[1]
    if initial_state is None:
        initial_state = x.new_zeros(b, width - 1, d)
    inputs = torch.cat([initial_state, x], dim=1)  # (b, w - 1 + l, d)
    y = bias + weight[:, -1] * x
    for back in range(1, width):
        earlier = inputs[:, width - 1 - back : width - 1 - back + l]  # x[t - back] at t
        if document_ids is not None:
            from_document = torch.cat([document_ids[:, :1].expand(-1, back), document_ids], dim=1)[:, :l]
            earlier = earlier.masked_fill((from_document != document_ids)[..., None], 0)
        y = y + weight[:, -1 - back] * earlier
    return F.silu(y), inputs[:, l:]


def ssd(x, dt, A, B, C, D, chunk_size, document_ids=None, initial_state=None):
    """State-space dual form of Mamba-2: the whole sequence in chunks of matrix products.

    x (b, l, h, p); dt (b, l, h), positive; A (h,), negative; B, C (b, l, g, n); D (h,).
    Computes S_t = exp(dt_t A) S_{t-1} + dt_t B_t x_t^T and y_t = C_t S_t + D x_t (arXiv:2405.21060, section 6), with
    S = 0 at each document's start, else initial_state (b, h, n, p) at the row's. Decays are accumulated in float32.
    Returns y (b, l, h, p) in x's dtype and the last state (b, h, n, p) in float32.
    """
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    q = min(chunk_size, l)
    padding = -l % q
    # A padded position has dt = 0: it neither decays nor feeds the state.
    xs, dt, B, C = (F.pad(t.float(), (0, 0) * (t.dim() - 2) + (0, padding)) for t in (x, dt, B, C))
    xs = rearrange(xs * dt[..., None], "b (c q) (g h) p -> b c g q h p", q=q, g=g)
    B, C = (rearrange(t, "b (c q) g n -> b c g q n", q=q) for t in (B, C))
    log_decay = rearrange(dt * A.float(), "b (c q) (g h) -> b c g h q", q=q, g=g)
    apart = torch.ones(q, q, dtype=torch.bool, device=x.device).triu(1)
    if document_ids is None:
        cum = decay_in = log_decay.cumsum(-1)  # since the chunk's start
        decay_out, decay_chunk = cum[..., -1:] - cum, cum[..., -1]  # from j to the chunk's end, and over all of it
    else:
        ids = torch.cat([document_ids, document_ids[:, -1:].expand(b, padding)], dim=1)
        ids = rearrange(ids, "b (c q) -> b c 1 1 q", q=q)
        before = torch.cat([ids[:, :1, ..., :1], ids[:, :-1, ..., -1:]], dim=1)  # the document that the state is of
        apart = apart | (ids[..., :, None] != ids[..., None, :])
        cum = cumsum_by_document(log_decay, ids)  # since the chunk's or the document's start
        decay_in = cum.masked_fill(ids != before, -torch.inf)
        decay_out = (cum[..., -1:] - cum).masked_fill(ids != ids[..., -1:], -torch.inf)
        decay_chunk = cum[..., -1].masked_fill((ids[..., -1:] != before)[..., 0], -torch.inf)
    decay_pair = (cum[..., :, None] - cum[..., None, :]).masked_fill(apart, -torch.inf)  # (b, c, g, h, q, q): j to i
    # exp(-inf) is exactly 0, with gradient 0; masking before exp keeps the unused half from overflowing
    scores = (C @ B.mT)[:, :, :, None] * decay_pair.exp()
    y = rearrange(scores @ rearrange(xs, "b c g q h p -> b c g h q p"), "b c g h q p -> b c g q h p")

    fed = xs * rearrange(decay_out.exp(), "b c g h q -> b c g q h 1")
    fed = rearrange(B.mT @ fed.flatten(-2), "b c g n (h p) -> b c g h n p", p=p)  # what each chunk adds to the state
    state = x.new_zeros(b, h, n, p, dtype=torch.float32) if initial_state is None else initial_state
    state = rearrange(state, "b (g h) n p -> b g h n p", g=g)
    entering = []
    for i in range(fed.shape[1]):
        entering.append(state)
        state = decay_chunk[:, i].exp()[..., None, None] * state + fed[:, i]
    entering = rearrange(torch.stack(entering, dim=1), "b c g h n p -> b c g n (h p)")
    carried = rearrange(C @ entering, "b c g q (h p) -> b c g q h p", p=p)
    y = y + carried * rearrange(decay_in.exp(), "b c g h q -> b c g q h 1")

    y = rearrange(y, "b c g q h p -> b (c q) (g h) p")[:, :l]
    return (y + D.float()[:, None] * x.float()).to(x.dtype), rearrange(state, "b g h n p -> b (g h) n p")


def cumsum_by_document(x, document_ids):
    """Cumulative sum over the last dimension that begins anew at each document.

    A difference of plain cumulative sums would carry the rounding of the documents before, and so a trace of them.
    """
    shift = 1
    while shift < x.shape[-1]:  # each step doubles how far back a sum reaches
        same = document_ids[..., shift:] == document_ids[..., :-shift]
        x = x + F.pad(x[..., :-shift].masked_fill(~same, 0), (shift, 0))
        shift *= 2
    return x


def ssd_recurrence(x, dt, A, B, C, D, document_ids=None, initial_state=None):
    """`ssd`, one position after another, as the recurrence is written: for tests and for decoding a token."""
    b, l, h, p = x.shape
    B, C = (t.float().repeat_interleave(h // t.shape[2], dim=2) for t in (B, C))  # (b, l, h, n)
    state = x.new_zeros(b, h, B.shape[-1], p, dtype=torch.float32) if initial_state is None else initial_state
    ys = []
    for t in range(l):
        decay = (dt[:, t].float() * A.float()).exp()  # (b, h)
        if document_ids is not None and t > 0:
            decay = decay.masked_fill((document_ids[:, t] != document_ids[:, t - 1])[:, None], 0)
        fed = B[:, t, :, :, None] * (dt[:, t].float()[..., None] * x[:, t].float())[:, :, None]  # (b, h, n, p)
        state = decay[..., None, None] * state + fed
        ys.append((C[:, t, :, None] @ state)[:, :, 0] + D.float()[:, None] * x[:, t].float())
    return torch.stack(ys, dim=1).to(x.dtype), state


def mixer(
    zxbcdt, conv_weight, conv_bias, A_log, D, dt_bias, norm_weight, n_groups, chunk_size, eps,
    document_ids=None, conv_state=None, ssm_state=None,
):  # fmt: skip
    """What lies between the two projections of a Mamba-2 mixer: convolution, scan and gated norm.

    zxbcdt (b, l, 2 d_inner + 2 g n + h): z, x, B, C and dt side by side. Weights: of the convolution (d_inner + 2 g n,
    w) and as many biases; A_log, D, dt_bias (h,); of the norm (d_inner,). The states are those of `causal_conv1d` and
    `ssd`. Returns y (b, l, d_inner) and both states after it.
    """
    d_inner, channels, h = norm_weight.numel(), conv_weight.shape[0], A_log.numel()
    z, xBC, dt = zxbcdt.split([d_inner, channels, h], dim=-1)
    xBC, conv_state = causal_conv1d(xBC, conv_weight, conv_bias, document_ids, conv_state)
    x, B, C = xBC.split([d_inner, (channels - d_inner) // 2, (channels - d_inner) // 2], dim=-1)
    x = rearrange(x, "b l (h p) -> b l h p", h=h)
    B, C = (rearrange(t, "b l (g n) -> b l g n", g=n_groups) for t in (B, C))
    dt = F.softplus(dt.float() + dt_bias.float())
    A = -A_log.float().exp()
    if zxbcdt.shape[1] == 1:
        y, ssm_state = ssd_recurrence(x, dt, A, B, C, D, document_ids, ssm_state)
    else:
        y, ssm_state = ssd(x, dt, A, B, C, D, chunk_size, document_ids, ssm_state)
    y = rearrange(y, "b l h p -> b l (h p)")
    return gated_rms_norm(y, z, norm_weight, n_groups, eps), conv_state, ssm_state


def mixer_step(
    zxbcdt, conv_weight, conv_bias, A_log, D, dt_bias, norm_weight, n_groups, eps, conv, ssm, lengths
):  # fmt: skip
    """`mixer` of one token a row, zxbcdt (b, 1, ...), with states in tensors that are changed in place. Returns y.

    conv (b, w, channels) is a ring: the input at position t is in slot t % w; ssm (b, h, n, p) in float32; lengths
    (b,): tokens before this one.
    """
    z, xBC, dt = zxbcdt.split([norm_weight.numel(), conv_weight.shape[0], A_log.numel()], dim=-1)
    (b, h, n, p), w = ssm.shape, conv.shape[1]
    rows = torch.arange(b, device=xBC.device)
    conv[rows, lengths % w] = xBC[:, 0]
    slots = (lengths[:, None] + torch.arange(1, w + 1, device=xBC.device)) % w  # the oldest first
    xBC = F.silu(conv_bias + (conv[rows[:, None], slots] * conv_weight.mT).sum(dim=1, keepdim=True))
    x, B, C = xBC.float().split([h * p, n_groups * n, n_groups * n], dim=-1)
    x = x.view(b, h, p)
    B, C = (t.view(b, n_groups, n).repeat_interleave(h // n_groups, dim=1) for t in (B, C))  # (b, h, n)
    dt = F.softplus(dt[:, 0].float() + dt_bias.float())
    ssm.mul_((-dt * A_log.float().exp())[..., None, None].exp()).add_(B[..., None] * (dt[..., None] * x)[:, :, None])
    y = (C[:, :, None] @ ssm)[:, :, 0] + D.float()[:, None] * x
    return gated_rms_norm(y.to(z.dtype).view(b, 1, h * p), z, norm_weight, n_groups, eps)


def rms_norm(x, weight, eps):
    """x / rms(x) * weight over the last dimension, in float32 (arXiv:1910.07467). Returns x's dtype."""
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)


def add_rms_norm(x, update, weight, eps, multiplier=1.0):
    """x + multiplier * update (x alone if update is None), in x's dtype, and the rms_norm of that."""
    total = x if update is None else torch.add(x, update, alpha=multiplier)
    return total, rms_norm(total, weight, eps)


def gated_rms_norm(x, z, weight, n_groups, eps):
    """rms_norm(x * silu(z)), each group of channels by itself: Mamba-2's norm before out_proj.

    x, z (b, l, d); weight (d,). Groups keep the norm local when groups are split over GPUs.
    """
    x = x.float() * F.silu(z.float())
    grouped = rearrange(x, "b l (g d) -> b l g d", g=n_groups)
    normed = F.rms_norm(grouped, grouped.shape[-1:], None, eps)
    return (rearrange(normed, "b l g d -> b l (g d)") * weight.float()).to(z.dtype)


def rotary(x, positions, frequencies, magnitude=1.0):
    """Rotate pairs of channels by an angle that grows with position (RoPE, arXiv:2104.09864; halves, not neighbours).

    x (b, l, h, p); positions (b, l) or (1, l); frequencies (p / 2,), radians a position; magnitude: onto the result.
    """
    angles = positions[..., None, None].float() * frequencies  # (b, l, 1, p / 2)
    cos, sin = angles.cos() * magnitude, angles.sin() * magnitude
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def swiglu(gate_up):
    """silu(gate) * up (arXiv:2002.05202), for gate and up side by side: (..., 2 f) -> (..., f)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def sigmoid_gate(x, gate):
    """x * sigmoid(gate), of one shape."""
    return x * gate.sigmoid()


def attention(q, k, v, start=None, *, packing=None, scale=None, slopes=None):
    """Causal grouped-query attention.

    q (b, l, h, p); k, v (b, m, k, p) with m >= l: the last l of the m positions are the queries' own. A query looks at
    all up to its own position: from start (b,) on, if rows are padded on the left, and in its document of `packing` (a
    layers.Packing), if that is given.
    scale: onto q k^T (None: 1 / sqrt(p)); slopes (h,): ALiBi, what a head subtracts from a score for each position
    between query and key, in float32. Returns (b, l, h, p).
    """
    l, m, dtype = q.shape[1], k.shape[1], q.dtype
    mask = None if packing is None else packing.mask
    if start is not None or (mask is None and (1 < l < m or slopes is not None)):
        mask = torch.ones(l, m, dtype=torch.bool, device=q.device).tril(m - l)
    if start is not None:
        mask = mask & (torch.arange(m, device=q.device) >= start[:, None, None, None])  # (b, 1, l, m)
    if slopes is not None:
        index = torch.arange(m, device=q.device)
        distance = index[m - l :, None] - index  # (l, m)
        mask = (-slopes[:, None, None] * distance).masked_fill(~mask, -torch.inf)  # (b or 1, h, l, m)
        q, k, v = q.float(), k.float(), v.float()  # a mask in bfloat16 would round distances above 256
    q, k, v = (rearrange(t, "b l h p -> b h l p") for t in (q, k, v))
    causal = mask is None and l == m > 1
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True)
    return rearrange(y, "b h l p -> b l h p").to(dtype)


def attention_step(q, k, v, keys, values, lengths, frequencies=None, magnitude=1.0, scale=None, slopes=None):
    """`attention` of one token a row to itself and to those before, in buffers that are changed in place.

    q (b, 1, h, p), k, v (b, 1, k, p), not yet rotated; keys, values (b, capacity, k, p): the row's first lengths (b,)
    places are filled, and the next takes k and v. frequencies, magnitude: as for `rotary`, None: no rotation.
    Returns (b, 1, h, p).
    """
    if frequencies is not None:
        q, k = (rotary(t, lengths[:, None], frequencies, magnitude) for t in (q, k))
    rows = torch.arange(len(q), device=q.device)
    keys[rows, lengths], values[rows, lengths] = k[:, 0], v[:, 0]
    if not keys.is_cuda:  # on a GPU, a graph of this has one shape for all lengths
        filled = int(lengths.max()) + 1
        keys, values = keys[:, :filled], values[:, :filled]
    distance = (lengths[:, None] - torch.arange(keys.shape[1], device=q.device))[:, None, None]  # (b, 1, 1, capacity)
    mask, dtype = distance >= 0, q.dtype
    if slopes is not None:
        mask = (-slopes[:, None, None] * distance).masked_fill(~mask, -torch.inf)
        q, keys, values = q.float(), keys.float(), values.float()
    q, keys, values = (t.transpose(1, 2) for t in (q, keys, values))
    y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
    return y.transpose(1, 2).to(dtype)


def cross_entropy(hidden, weight, targets, z_loss=0.0):
    """Mean loss in nats, over the targets that are not -100, of the logits hidden @ weight^T.

    hidden (t, d); weight (vocab, d); targets (t,). The softmax is in float32. z_loss: its product with the mean
    square of log Z is added, Z being the softmax's denominator, to keep log Z near 0 (PaLM, arXiv:2204.02311,
    section 5).
    """
    logits = linear(hidden, weight).float()
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORED_TARGET)
    if z_loss:
        counts = targets != IGNORED_TARGET
        loss = loss + z_loss * (logits.logsumexp(dim=-1).square() * counts).sum() / counts.sum()
    return loss
