"""Our shapes and parameter names, and those of transformers' stock classes: GraniteMoeHybrid (dense) and Bamba.

Both classes have our mathematics under other names: where theirs is one matrix, ours are several, as rows of it.
"""

from model.config import ModelConfig

GRANITE, BAMBA = "granitemoehybrid", "bamba"
CLASSES = {GRANITE: "GraniteMoeHybridForCausalLM", BAMBA: "BambaForCausalLM"}
# the names that Granite 4.0's own configurations have: transformers 5 reads them too, llama.cpp's converter only them
LAYER_TYPES = {"M": "mamba", "A": "attention"}
KINDS = {"mamba": "M", "linear_attention": "M", "attention": "A", "full_attention": "A"}

MAMBA = {
    "in_proj.weight": ("in_proj.z", "in_proj.x", "in_proj.B", "in_proj.C", "in_proj.dt"),
    "conv1d.weight": ("conv1d_weight",),  # (channels, 1, width) there, (channels, width) here
    "conv1d.bias": ("conv1d_bias",),
    "A_log": ("A_log",),
    "D": ("D",),
    "dt_bias": ("dt_bias",),
    "norm.weight": ("norm_weight",),
    "out_proj.weight": ("out_proj.weight",),
}
ATTENTION = {
    "q_proj.weight": ("in_proj.q",),
    "k_proj.weight": ("in_proj.k",),
    "v_proj.weight": ("in_proj.v",),
    "o_proj.weight": ("out_proj.weight",),
}
LAYER = {
    GRANITE: {
        "input_layernorm.weight": ("mixer_norm.weight",),
        "post_attention_layernorm.weight": ("mlp_norm.weight",),
        "shared_mlp.input_linear.weight": ("mlp.in_proj.gate", "mlp.in_proj.up"),
        "shared_mlp.output_linear.weight": ("mlp.out_proj.weight",),
    },
    BAMBA: {
        "input_layernorm.weight": ("mixer_norm.weight",),
        "pre_ff_layernorm.weight": ("mlp_norm.weight",),
        "feed_forward.gate_proj.weight": ("mlp.in_proj.gate",),
        "feed_forward.up_proj.weight": ("mlp.in_proj.up",),
        "feed_forward.down_proj.weight": ("mlp.out_proj.weight",),
    },
}
FINAL_NORM = {GRANITE: "model.norm.weight", BAMBA: "model.final_layernorm.weight"}


def parameter_names(config, family):
    """{their name: the names of ours that make it up, as rows one below the other}, for a stock class."""
    names = {"model.embed_tokens.weight": ("embedding.weight",), FINAL_NORM[family]: ("norm.weight",)}
    if not config.tied_embeddings:
        names["lm_head.weight"] = ("head.weight",)
    for i, kind in enumerate(config.layer_pattern):
        mixer = below("mamba", "mixer", MAMBA) if kind == "M" else below("self_attn", "mixer", ATTENTION)
        names |= below(f"model.layers.{i}", f"layers.{i}", LAYER[family] | mixer)
    return names


def turning_first(weight, config):
    """The rows of a stock class's q_proj or k_proj in our order, where only a part of each head turns.

    Bamba turns the first rope_dim channels, each with the one half of rope_dim behind it; ours has half of a head
    between the two of every pair. The order changes no product of a query and a key.
    """
    p, half = config.head_dim, config.rope_dim // 2
    rest = range(2 * half, p)
    middle = len(rest) // 2
    order = [*range(half), *rest[:middle], *range(half, 2 * half), *rest[middle:]]
    return weight.unflatten(0, (-1, p))[:, order].flatten(0, 1)


def below(theirs, ours, names):
    """The same table for a module that stands at `theirs` and at `ours`."""
    return {f"{theirs}.{name}": tuple(f"{ours}.{part}" for part in parts) for name, parts in names.items()}


def why_not_granite(config):
    """What of this shape the dense GraniteMoeHybridForCausalLM lacks, in a few words; None if nothing."""
    lacks = [
        (config.attention_gate, "the output gate of attention"),
        (config.qk_norm, "the norm of queries and keys"),
        (config.positions == "alibi", "ALiBi"),
        (config.rope_dim is not None, "heads of which only a part turns"),
        (config.embedding_norm, "the norm after the embedding"),
        (config.d_ff == 0, "layers without a SwiGLU"),
        # transformers' cache counts the tokens in an attention layer
        ("A" not in config.layer_pattern, "generation without an attention layer"),
    ]
    return ", ".join(what for has, what in lacks if has) or None


def granite_config(config):
    """config.json of the stock class, as a dict, for a shape of which it lacks nothing."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling == "ntk":  # a larger base and nothing else
        rope["rope_theta"] *= config.rope_factor ** (config.head_dim / (config.head_dim - 2))
    elif config.rope_scaling != "none":
        rope |= {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling == "yarn":
        rope["original_max_position_embeddings"] = config.rope_original_seq_len
    return {
        "model_type": GRANITE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "layer_types": [LAYER_TYPES[kind] for kind in config.layer_pattern],
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "intermediate_size": config.d_ff,
        "shared_intermediate_size": config.d_ff,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "hidden_act": "silu",
        "max_position_embeddings": config.seq_len,
        "position_embedding_type": "rope" if config.positions == "rope" else None,
        "rope_theta": rope["rope_theta"],  # readers older than transformers 5 look here
        "rope_parameters": rope,
        "rms_norm_eps": config.norm_eps,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tied_embeddings,
        "embedding_multiplier": config.embedding_multiplier,
        "attention_multiplier": config.attention_multiplier or config.head_dim**-0.5,
        "residual_multiplier": config.residual_multiplier,
        "logits_scaling": config.logits_scaling,
        "mamba_n_heads": config.n_mamba_heads,
        "mamba_d_head": config.mamba_head_dim,
        "mamba_n_groups": config.n_groups,
        "mamba_d_state": config.d_state,
        "mamba_d_conv": config.d_conv,
        "mamba_expand": config.expand,
        "mamba_chunk_size": config.chunk_size,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "initializer_range": 0.02,
        "use_cache": True,
    }


def model_config(theirs):
    """The ModelConfig of a GraniteMoeHybridConfig or BambaConfig of transformers.

    Raises ValueError, naming the field, for what our network does not have.
    """
    family = theirs.model_type
    bamba = family == BAMBA
    if family not in CLASSES:
        raise ValueError(f"its model_type is {family!r}; import takes {' and '.join(CLASSES)}")
    rope = dict(theirs.rope_parameters or {})
    scaling = rope.get("rope_type", "default").replace("default", "none")
    for field, value, allowed in (
        ("num_local_experts", getattr(theirs, "num_local_experts", 0), 0),
        ("hidden_act", theirs.hidden_act, "silu"),
        ("attention_bias", theirs.attention_bias, False),
        ("mlp_bias", getattr(theirs, "mlp_bias", False), False),
        ("mamba_proj_bias", theirs.mamba_proj_bias, False),
        ("mamba_conv_bias", theirs.mamba_conv_bias, True),
        ("time_step_limit", tuple(theirs.time_step_limit or (0.0, float("inf"))), (0.0, float("inf"))),
        ("head_dim", getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads,
         theirs.hidden_size // theirs.num_attention_heads),
    ):  # fmt: skip
        if value != allowed:
            raise ValueError(f"its {field} is {value!r}; our network has only {allowed!r}")
    pattern = "".join(KINDS.get(kind, "?") for kind in theirs.layers_block_type)
    if "?" in pattern:
        raise ValueError(f"its layers are {sorted(set(theirs.layers_block_type))}; our network has {', '.join(KINDS)}")
    shape = dict(
        d_model=theirs.hidden_size,
        layer_pattern=pattern,
        n_heads=theirs.num_attention_heads,
        n_kv_heads=theirs.num_key_value_heads,
        d_ff=theirs.intermediate_size if bamba else theirs.shared_intermediate_size,
        seq_len=theirs.max_position_embeddings,
        vocab_size=theirs.vocab_size,
        d_state=theirs.mamba_d_state,
        mamba_head_dim=theirs.mamba_d_head,
        n_groups=theirs.mamba_n_groups,
        d_conv=theirs.mamba_d_conv,
        expand=theirs.mamba_expand,
        chunk_size=theirs.mamba_chunk_size,
        tied_embeddings=theirs.tie_word_embeddings,
        norm_eps=theirs.rms_norm_eps,
    )
    if "A" in pattern:
        shape |= attention_fields(theirs, rope, scaling)
    if not bamba:
        for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
            shape[name] = float(getattr(theirs, name))
        attention_multiplier = float(theirs.attention_multiplier)
        if "A" in pattern and attention_multiplier != (theirs.hidden_size // theirs.num_attention_heads) ** -0.5:
            shape["attention_multiplier"] = attention_multiplier
    return ModelConfig(**shape)


def attention_fields(theirs, rope, scaling):
    """What the ModelConfig says of positions."""
    if theirs.model_type == GRANITE and theirs.position_embedding_type != "rope":
        return {"positions": "none"}
    if scaling not in ("none", "linear", "yarn"):
        raise ValueError(f"its rope_type is {scaling!r}; our network has default, linear and yarn")
    known = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"}
    if extra := sorted(name for name in set(rope) - known if rope[name] is not None):
        raise ValueError(f"its rope_parameters have {', '.join(extra)}, which our network has not")
    fields = {"rope_theta": float(rope["rope_theta"])}
    share = rope.get("partial_rotary_factor", 1.0) if theirs.model_type == BAMBA else 1.0
    if share != 1:
        fields["rope_dim"] = int(share * (theirs.hidden_size // theirs.num_attention_heads))
    if scaling != "none":
        fields |= {"rope_scaling": scaling, "rope_factor": float(rope["factor"])}
    if scaling == "yarn":
        fields["rope_original_seq_len"] = rope["original_max_position_embeddings"]
    return fields
