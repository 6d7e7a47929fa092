"""Our shapes and parameter names, and those of transformers' stock classes: GraniteMoeHybrid (dense), Mamba2, Bamba.

The classes have our mathematics under other names: where theirs is one matrix, ours are several, as rows of it.
"""

from model.config import ModelConfig

GRANITE, BAMBA, MAMBA2 = "granitemoehybrid", "bamba", "mamba2"
CLASSES = {GRANITE: "GraniteMoeHybridForCausalLM", BAMBA: "BambaForCausalLM", MAMBA2: "Mamba2ForCausalLM"}
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
    MAMBA2: {"norm.weight": ("mixer_norm.weight",)},
}
# embedding, last norm, the layers, and the Mamba-2 mixer in a layer
FRAME = {
    GRANITE: ("model.embed_tokens.weight", "model.norm.weight", "model.layers", "mamba"),
    BAMBA: ("model.embed_tokens.weight", "model.final_layernorm.weight", "model.layers", "mamba"),
    MAMBA2: ("backbone.embeddings.weight", "backbone.norm_f.weight", "backbone.layers", "mixer"),
}


def parameter_names(config, family):
    """{their name: the names of ours that make it up, as rows one below the other}, for a stock class."""
    embedding, norm, layers, mamba = FRAME[family]
    names = {embedding: ("embedding.weight",), norm: ("norm.weight",)}
    if not config.tied_embeddings:
        names["lm_head.weight"] = ("head.weight",)
    for i, kind in enumerate(config.layer_pattern):
        mixer = below(mamba, "mixer", MAMBA) if kind == "M" else below("self_attn", "mixer", ATTENTION)
        names |= below(f"{layers}.{i}", f"layers.{i}", LAYER[family] | mixer)
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


def stock_class(config):
    """(GRANITE or MAMBA2, None) where the class has all that the shape needs, else (None, what the nearer lacks)."""
    if "A" not in config.layer_pattern and config.d_ff == 0:
        family = MAMBA2
        lacks = [
            (config.embedding_norm, "the norm after the embedding"),
            (config.embedding_multiplier != 1, "a multiplier of the embedding"),
            (config.residual_multiplier != 1, "a multiplier of the residual stream"),
            (config.logits_scaling != 1, "a divisor of the logits"),
        ]
    else:
        family = GRANITE
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
    missing = ", ".join(what for has, what in lacks if has)
    return (None, f"{CLASSES[family]} lacks {missing}") if missing else (family, None)


def stock_config(config, family):
    """config.json of the class that stock_class has chosen, as a dict."""
    return granite_config(config) if family == GRANITE else mamba2_config(config)


def mamba2_config(config):
    return {
        "architectures": [CLASSES[MAMBA2]],
        "model_type": MAMBA2,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_heads": config.n_mamba_heads,
        "head_dim": config.mamba_head_dim,
        "state_size": config.d_state,
        "n_groups": config.n_groups,
        "conv_kernel": config.d_conv,
        "expand": config.expand,
        "chunk_size": config.chunk_size,
        "max_position_embeddings": config.seq_len,  # read by lm-eval and by our own import
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": False,
        "use_cache": True,
        "pad_token_id": None,
    }


def granite_config(config):
    names = [CLASSES[GRANITE]]
    if config.positions == "rope" and "M" in config.layer_pattern:
        # llama.cpp's converter rotates the queries and keys of this class's hybrids only if it finds this name too
        names.append(CLASSES[BAMBA])
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling == "ntk":  # a larger base and nothing else
        rope["rope_theta"] *= config.rope_factor ** (config.head_dim / (config.head_dim - 2))
    elif config.rope_scaling != "none":
        rope |= {"rope_type": config.rope_scaling, "factor": config.rope_factor}
    if config.rope_scaling == "yarn":
        rope["original_max_position_embeddings"] = config.rope_original_seq_len
    return {
        "architectures": names,
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
    """The ModelConfig of a GraniteMoeHybridConfig, Mamba2Config or BambaConfig of transformers.

    Raises ValueError, naming the field, for what our network does not have.
    """
    if theirs.model_type not in CLASSES:
        raise ValueError(f"its model_type is {theirs.model_type!r}; import takes {', '.join(CLASSES)}")
    for field, allowed in (
        ("num_local_experts", 0),
        ("hidden_act", "silu"),
        ("attention_bias", False),
        ("mlp_bias", False),
        ("mamba_proj_bias", False),
        ("use_bias", False),
        ("mamba_conv_bias", True),
        ("use_conv_bias", True),
    ):
        if getattr(theirs, field, allowed) != allowed:
            raise ValueError(f"its {field} is {getattr(theirs, field)!r}; our network has only {allowed!r}")
    if tuple(theirs.time_step_limit or ()) not in ((), (0.0, float("inf"))):
        raise ValueError(f"its time_step_limit is {tuple(theirs.time_step_limit)}; our network has no limit")
    common = dict(
        d_model=theirs.hidden_size, vocab_size=theirs.vocab_size, tied_embeddings=bool(theirs.tie_word_embeddings)
    )
    shape = mamba2_shape(theirs) if theirs.model_type == MAMBA2 else hybrid_shape(theirs)
    return ModelConfig(**common, **shape)


def mamba2_shape(theirs):
    n_heads = max(1, theirs.hidden_size // 64)  # they would act only in a pattern with attention
    return dict(
        layer_pattern="M" * theirs.num_hidden_layers,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        d_ff=0,
        seq_len=getattr(theirs, "max_position_embeddings", 2048),  # what the paper's models were trained on
        d_state=theirs.state_size,
        mamba_head_dim=theirs.head_dim,
        n_groups=theirs.n_groups,
        d_conv=theirs.conv_kernel,
        expand=theirs.expand,
        chunk_size=theirs.chunk_size,
        norm_eps=theirs.layer_norm_epsilon,
    )


def hybrid_shape(theirs):
    pattern = "".join(KINDS.get(kind, "?") for kind in theirs.layers_block_type)
    if "?" in pattern:
        raise ValueError(f"its layers are {sorted(set(theirs.layers_block_type))}; our network has {', '.join(KINDS)}")
    shape = dict(
        layer_pattern=pattern,
        n_heads=theirs.num_attention_heads,
        n_kv_heads=theirs.num_key_value_heads,
        d_ff=theirs.intermediate_size if theirs.model_type == BAMBA else theirs.shared_intermediate_size,
        seq_len=theirs.max_position_embeddings,
        d_state=theirs.mamba_d_state,
        mamba_head_dim=theirs.mamba_d_head,
        n_groups=theirs.mamba_n_groups,
        d_conv=theirs.mamba_d_conv,
        expand=theirs.mamba_expand,
        chunk_size=theirs.mamba_chunk_size,
        norm_eps=theirs.rms_norm_eps,
    )
    if "A" in pattern:
        shape |= attention_fields(theirs)
    if theirs.model_type == GRANITE:
        for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
            shape[name] = float(getattr(theirs, name))
    return shape


def attention_fields(theirs):
    """What the ModelConfig says of positions and of the multiplier onto q k^T."""
    head_dim = theirs.hidden_size // theirs.num_attention_heads
    if (getattr(theirs, "head_dim", None) or head_dim) != head_dim:
        raise ValueError(f"its head_dim is {theirs.head_dim}; our network has only d_model / n_heads, here {head_dim}")
    fields = {}
    if theirs.model_type == GRANITE and theirs.attention_multiplier != head_dim**-0.5:
        fields["attention_multiplier"] = float(theirs.attention_multiplier)
    if theirs.model_type == GRANITE and theirs.position_embedding_type != "rope":
        return fields | {"positions": "none"}
    rope = dict(theirs.rope_parameters or {})
    scaling = rope.get("rope_type", "default").replace("default", "none")
    if scaling not in ("none", "linear", "yarn"):
        raise ValueError(f"its rope_type is {scaling!r}; our network has default, linear and yarn")
    known = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"}
    if extra := sorted(name for name in set(rope) - known if rope[name] is not None):
        raise ValueError(f"its rope_parameters have {', '.join(extra)}, which our network has not")
    fields["rope_theta"] = float(rope["rope_theta"])
    share = rope.get("partial_rotary_factor", 1.0) if theirs.model_type == BAMBA else 1.0
    if share != 1:
        fields["rope_dim"] = int(share * head_dim)
    if scaling != "none":
        fields |= {"rope_scaling": scaling, "rope_factor": float(rope["factor"])}
    if scaling == "yarn":
        fields["rope_original_seq_len"] = rope["original_max_position_embeddings"]
    return fields
