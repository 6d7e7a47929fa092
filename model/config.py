"""The shape of a model: one frozen dataclass, one table of named sizes, and the counts that follow from them.

Needs no torch, so that a laptop can plan a run:  PRESETS["1.3B"].n_parameters
"""

from dataclasses import dataclass, fields, replace
from functools import cached_property

POSITIONS = ("rope", "alibi", "none")  # rotary; a slope a head (ALiBi); nothing but the causal mask (NoPE)
ROPE_SCALINGS = ("none", "linear", "ntk", "yarn")
FP8_MULTIPLE = 16  # each dimension of a product in 8-bit floats is a multiple of it (model/fp8.py)
MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
ROPE_OPTIONS = {"rope_theta", "rope_dim", "rope_scaling", "rope_factor"}
ATTENTION_OPTIONS = ROPE_OPTIONS | {"positions", "attention_gate", "qk_norm", "attention_multiplier"}


def check_layer_pattern(pattern):
    """ValueError unless the pattern is a string of the letters M and A."""
    bad = sorted(set(pattern) - set("MA"))
    if bad or not pattern:
        raise ValueError(f"layer pattern {pattern!r} is not a string of M (Mamba-2) and A (attention)")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder of Mamba-2 and attention layers, each followed by a SwiGLU. ValueError for a shape that cannot be.

    The notation is the Mamba-2 paper's (arXiv:2405.21060) and mamba_ssm's.
    """

    # fmt: off
    d_model: int                   # width of the residual stream
    layer_pattern: str             # one letter a layer: "M" = Mamba-2, "A" = attention
    n_heads: int                   # query heads of an attention layer
    n_kv_heads: int                # key and value heads of an attention layer (grouped-query attention)
    d_ff: int                      # inner width of the SwiGLU after each mixer; 0 leaves it out
    seq_len: int                   # tokens in a training sequence
    vocab_size: int = 50304        # rows of the embedding and of the head; training sets it from the tokenizer
    d_state: int = 128             # N, the state each Mamba head keeps for each of its channels
    mamba_head_dim: int = 64       # P, channels of a Mamba head
    n_groups: int = 1              # groups of heads that share B and C
    d_conv: int = 4                # width of the causal convolution
    expand: int = 2                # d_inner / d_model
    chunk_size: int = 256          # Q, positions that the scan handles as one matrix product; changes speed only
    attention_gate: bool = False   # a sigmoid of the layer's input scales the heads' outputs
    qk_norm: bool = False          # RMSNorm over each query and key head, before the positions
    positions: str = "rope"        # how attention knows them: one of POSITIONS
    rope_theta: float = 10000.0    # base of the rotary angles (arXiv:2104.09864)
    rope_dim: int | None = None    # channels of each head that turn, an even number; None: all (Bamba turns half)
    rope_scaling: str = "none"     # one of ROPE_SCALINGS, for contexts longer than the angles were trained on
    rope_factor: float = 1.0       # by how much longer
    rope_original_seq_len: int | None = None  # the context before the scaling; "yarn" alone needs it
    tied_embeddings: bool = False  # the head's matrix is the embedding's
    embedding_norm: bool = False   # RMSNorm after the embedding
    zero_init_output: bool = False # projections onto the residual stream start at zero: every layer as the identity
    embedding_multiplier: float = 1.0           # these four are Granite's: onto the embedding,
    attention_multiplier: float | None = None   # onto q k^T (None: 1 / sqrt(head_dim)),
    residual_multiplier: float = 1.0            # onto what a mixer or SwiGLU adds to the residual stream,
    logits_scaling: float = 1.0                 # and a divisor of the logits
    norm_eps: float = 1e-5
    # fmt: on

    def __post_init__(self):
        check_layer_pattern(self.layer_pattern)
        for total, part, what in (
            (self.d_model, self.n_heads, "d_model is not a multiple of n_heads"),
            (self.n_heads, self.n_kv_heads, "n_heads is not a multiple of n_kv_heads"),
            (self.d_inner, self.mamba_head_dim, "expand * d_model is not a multiple of mamba_head_dim"),
            (self.n_mamba_heads, self.n_groups, "the number of Mamba heads is not a multiple of n_groups"),
            (self.head_dim, 2, "the attention head width is odd, and rotary embedding pairs channels"),
        ):
            if part < 1 or total < 1 or total % part:
                raise ValueError(f"{what}: {total} and {part}")
        self._check_options()

    def _check_options(self):
        """Refuse an option that would do nothing, or that has no meaning."""
        for name, allowed in (("positions", POSITIONS), ("rope_scaling", ROPE_SCALINGS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}")
        if self.d_ff < 0:
            raise ValueError(f"d_ff {self.d_ff} is negative; 0 leaves the SwiGLU out")
        for name in ("rope_theta", *MULTIPLIERS):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} {value} is not positive")
        set_to = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        for name, value in set_to.items():
            if name in ATTENTION_OPTIONS and "A" not in self.layer_pattern:
                raise ValueError(
                    f"{name} {value!r} acts on attention layers, and the layer pattern {self.layer_pattern!r} has none"
                )
            if name in ROPE_OPTIONS and self.positions != "rope":
                raise ValueError(f"{name} {value!r} needs positions 'rope', not {self.positions!r}")
        if self.rope_dim is not None and self.rope_scaling != "none":
            raise ValueError(f"rope_scaling {self.rope_scaling!r} needs whole heads that turn; leave out rope_dim")
        if self.rope_dim is not None and (self.rope_dim % 2 or not 0 < self.rope_dim < self.head_dim):
            raise ValueError(f"rope_dim {self.rope_dim} is not an even number below the head width {self.head_dim}")
        if self.rope_scaling == "none" and self.rope_factor != 1:
            raise ValueError(f"rope_factor {self.rope_factor} needs a rope_scaling: {', '.join(ROPE_SCALINGS[1:])}")
        if self.rope_scaling != "none" and not self.rope_factor > 1:
            raise ValueError(f"rope_scaling {self.rope_scaling!r} needs a rope_factor above 1, not {self.rope_factor}")
        if self.rope_scaling == "ntk" and self.head_dim < 4:
            raise ValueError(f"rope_scaling 'ntk' needs attention heads of 4 channels or more, not {self.head_dim}")
        if (self.rope_original_seq_len is not None) != (self.rope_scaling == "yarn"):
            raise ValueError(
                f"rope_original_seq_len {self.rope_original_seq_len} with rope_scaling {self.rope_scaling!r}: "
                "'yarn' needs it, and nothing else reads it"
            )
        if self.rope_original_seq_len is not None and self.rope_original_seq_len < 1:
            raise ValueError(f"rope_original_seq_len {self.rope_original_seq_len} is not positive")
        if self.embedding_norm and self.embedding_multiplier != 1:
            raise ValueError(
                f"embedding_multiplier {self.embedding_multiplier} does nothing before embedding_norm; leave one out"
            )

    @property
    def n_layers(self):
        return len(self.layer_pattern)

    @property
    def head_dim(self):
        """Channels of an attention head."""
        return self.d_model // self.n_heads

    @property
    def d_inner(self):
        """Channels of a Mamba-2 mixer."""
        return self.expand * self.d_model

    @property
    def n_mamba_heads(self):
        return self.d_inner // self.mamba_head_dim

    @property
    def d_conv_channels(self):
        """Channels that pass through the convolution: x, B and C."""
        return self.d_inner + 2 * self.n_groups * self.d_state

    @cached_property
    def parameters_by_part(self):
        """Parameters of the whole model as {part: count}; equal to the module's own, which a test checks."""
        d, n_attention = self.d_model, self.layer_pattern.count("A")
        n_mamba, d_kv = self.n_layers - n_attention, self.n_kv_heads * self.head_dim
        in_proj = d * (self.d_inner + self.d_conv_channels + self.n_mamba_heads)
        conv = self.d_conv_channels * (self.d_conv + 1)
        per_head = 3 * self.n_mamba_heads  # A_log, D, dt_bias
        n_norms = self.n_layers * (2 if self.d_ff else 1) + 1 + self.embedding_norm
        return {
            "embedding": self.vocab_size * d,
            "attention": n_attention * d * ((3 if self.attention_gate else 2) * d + 2 * d_kv),
            "mamba": n_mamba * (in_proj + conv + per_head + self.d_inner + self.d_inner * d),
            "mlp": self.n_layers * 3 * d * self.d_ff,
            "norms": n_norms * d + (2 * n_attention * self.head_dim if self.qk_norm else 0),
            "head": 0 if self.tied_embeddings else self.vocab_size * d,
        }

    @property
    def largest_parameter(self):
        """Elements of the largest weight."""
        return self.d_model * max(self.vocab_size, self.d_ff, self.d_inner)

    @property
    def n_parameters(self):
        return sum(self.parameters_by_part.values())

    @property
    def flops_per_token_by_part(self):
        """Floating-point operations a token of one training step, forward and backward, at seq_len, as {part: count}.

        A multiply-add is two; backward is twice forward; attention counts the causal half; the scan counts
        7 * d_inner * d_state a token and layer (Megatron-LM's formula); recomputation, norms, activations and the
        embedding look-up count nothing. This is the "model FLOPs" of an MFU.
        """
        d, n_attention = self.d_model, self.layer_pattern.count("A")
        n_mamba, d_kv = self.n_layers - n_attention, self.n_kv_heads * self.head_dim
        in_proj = d * (self.d_inner + self.d_conv_channels + self.n_mamba_heads)
        forward = {
            "attention_projections": 2 * n_attention * d * ((3 if self.attention_gate else 2) * d + 2 * d_kv),
            "attention_scores": n_attention * 2 * d * self.seq_len,  # 2 products x 2 x d x seq_len / 2
            "mamba_projections": 2 * n_mamba * (in_proj + self.d_inner * d),
            "mamba_conv": 2 * n_mamba * self.d_conv_channels * self.d_conv,
            "mamba_scan": 7 * n_mamba * self.d_inner * self.d_state,
            "mlp": 2 * self.n_layers * 3 * d * self.d_ff,
            "head": 2 * d * self.vocab_size,
        }
        return {part: 3 * count for part, count in forward.items()}

    @property
    def flops_per_token(self):
        return sum(self.flops_per_token_by_part.values())


def place_attention(n_layers, *, first, middle, last):
    """A layer pattern with attention where it matters: the first layers, `middle` spread evenly, and the last layers.

    Every other layer is Mamba-2.  place_attention(8, first=1, middle=1, last=1) == "AMMMAMMA"
    """
    gap = n_layers - first - last
    if min(first, middle, last) < 0 or middle > gap:
        raise ValueError(f"{first} + {middle} + {last} attention layers do not fit into {n_layers} layers")
    inner = ["M"] * gap
    for i in range(middle):
        inner[(2 * i + 1) * gap // (2 * middle)] = "A"  # the middles of `middle` equal stretches
    return "A" * first + "".join(inner) + "A" * last


def _real(n_layers, *, d_model, d_ff, first, middle, last):
    """A production size: context 8192, attention heads of 128 channels, four query heads to a key/value head."""
    n_heads = d_model // 128
    return ModelConfig(
        d_model=d_model,
        layer_pattern=place_attention(n_layers, first=first, middle=middle, last=last),
        n_heads=n_heads,
        n_kv_heads=n_heads // 4,
        d_ff=d_ff,
        seq_len=8192,
    )


def _gated(repeats, *, d_model, n_heads, n_kv_heads, d_ff):
    """A size of the gated ladder: one attention layer in four, its output gated; context 4096."""
    return ModelConfig(
        d_model=d_model,
        layer_pattern="MMMA" * repeats,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_ff=d_ff,
        seq_len=4096,
        attention_gate=True,
        embedding_norm=True,
        zero_init_output=True,
    )


def _small(pattern, *, d_model, d_ff, n_heads, n_kv_heads):
    """A size for a card of 8 GB: Mamba-2 early, attention late; vocabulary 32,000, context 1024."""
    return ModelConfig(
        d_model=d_model,
        layer_pattern=pattern,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_ff=d_ff,
        seq_len=1024,
        vocab_size=32000,
    )


def _mamba(n_layers, *, d_model):
    """A size of the Mamba-2 paper (arXiv:2405.21060): mixers alone, no SwiGLU, tied embeddings, context 2048.

    The head counts act only where a pattern with attention replaces the size's own.
    """
    return ModelConfig(
        d_model=d_model,
        layer_pattern="M" * n_layers,
        n_heads=d_model // 64,
        n_kv_heads=d_model // 64,
        d_ff=0,
        seq_len=2048,
        tied_embeddings=True,
    )


# learns on two CPU cores in minutes
_NANO = ModelConfig(
    d_model=128, layer_pattern="MMAMMA", n_heads=4, n_kv_heads=2, d_ff=384, seq_len=256,
    vocab_size=4096, d_state=32, mamba_head_dim=32, chunk_size=64,
)  # fmt: skip

# Widths. d_model and d_ff are multiples of 128, most of 256, so that every matrix product fills the tensor cores'
# tiles; heads are 64 or 128 wide, what the attention kernels are written for. d_ff is what brings a size to its count.
# fmt: off
PRESETS = {
    "tiny":       ModelConfig(d_model=32, layer_pattern="MA", n_heads=2, n_kv_heads=1, d_ff=64, seq_len=64,
                              vocab_size=512, d_state=16, mamba_head_dim=16, chunk_size=16),  # for tests
    "nano":       _NANO,

    # production: attention in the first, some middle and the last layers
    "1.3B":       _real(24, d_model=2048, d_ff=4864, first=1, middle=3, last=2),  # 19 x 256
    "2.7B":       _real(32, d_model=2560, d_ff=4864, first=2, middle=4, last=2),  # 19 x 256; 20 query heads, 5 pairs
    "6.7B":       _real(32, d_model=4096, d_ff=6912, first=2, middle=4, last=2),  # 27 x 256
    "13B":        _real(40, d_model=5120, d_ff=7680, first=2, middle=5, last=3),  # 1.5 d_model, 30 x 256

    # (M M M A) repeated, gated; nano-gated is nano with the gate alone
    "nano-gated": replace(_NANO, attention_gate=True),
    "32M-gated":  _gated(2, d_model=256,  n_heads=4,  n_kv_heads=1, d_ff=512),   # four fifths are vocabulary
    "125M-gated": _gated(3, d_model=640,  n_heads=10, n_kv_heads=2, d_ff=1408),  # heads of 64, to have ten
    "350M-gated": _gated(4, d_model=1024, n_heads=8,  n_kv_heads=2, d_ff=3072),  # 3 d_model; heads of 128 from here on
    "760M-gated": _gated(5, d_model=1536, n_heads=12, n_kv_heads=3, d_ff=3840),  # 2.5 d_model, 15 x 256
    "1.3B-gated": _gated(6, d_model=2048, n_heads=16, n_kv_heads=4, d_ff=4608),  # 2.25 d_model, 18 x 256

    # the laboratory of --layer-pattern; heads of 64 in attention and of 128 in Mamba: 16 of each
    "lab":        ModelConfig(d_model=1024, layer_pattern="AM" * 8, n_heads=16, n_kv_heads=16, d_ff=2816, seq_len=512,
                              vocab_size=49152, d_state=48, mamba_head_dim=128),  # 2.75 d_model, 11 x 256

    # 8 layers of 512 reach 100M through a wide SwiGLU alone; loss hardly minds (arXiv:2001.08361, figure 5)
    "50M":        _small("MMMMAA",       d_model=384, d_ff=3072, n_heads=6,  n_kv_heads=2),  # 8 d_model
    "100M":       _small("MMMMMAAA",     d_model=512, d_ff=4608, n_heads=8,  n_kv_heads=2),  # 9 d_model, 18 x 256
    "150M":       _small("MMMMMMMMAAAA", d_model=768, d_ff=2304, n_heads=12, n_kv_heads=4),  # 3 d_model, 9 x 256

    # without attention
    "mamba-130M": _mamba(24, d_model=768),
    "mamba-370M": _mamba(48, d_model=1024),
    "mamba-1.3B": _mamba(48, d_model=2048),
}
# fmt: on


def get_preset(size, *, layer_pattern=None, seq_len=None, rope_scaling=None):
    """The ModelConfig of a named size, with another pattern or sequence length where one is given.

    rope_scaling stretches the rotary angles by seq_len / the size's own. Raises ValueError, in one line, for a name
    that is not in the table, a pattern that is none, or a scaling with nothing to stretch.
    """
    if size not in PRESETS:
        raise ValueError(f"unknown size {size!r}; choose one of {', '.join(PRESETS)}")
    preset = PRESETS[size]
    changes = {}
    if layer_pattern is not None:
        changes["layer_pattern"] = layer_pattern
    if seq_len is not None:
        if seq_len < 1:
            raise ValueError(f"seq_len {seq_len} is too small; allowed: 1 or more")
        changes["seq_len"] = seq_len
    if rope_scaling is not None:
        if rope_scaling not in ROPE_SCALINGS[1:]:
            raise ValueError(
                f"--rope-scaling {rope_scaling!r} is unknown; choose one of {', '.join(ROPE_SCALINGS[1:])}"
            )
        if seq_len is None or seq_len <= preset.seq_len:
            raise ValueError(
                f"--rope-scaling {rope_scaling} stretches the positions of {size}, trained on {preset.seq_len}: "
                f"give a --seq-len above that{'' if seq_len is None else f', not {seq_len}'}"
            )
        changes |= {"rope_scaling": rope_scaling, "rope_factor": seq_len / preset.seq_len}
        if rope_scaling == "yarn":
            changes["rope_original_seq_len"] = preset.seq_len
    return replace(preset, **changes)
