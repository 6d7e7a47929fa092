"""config.json of an exported shape that no stock class of transformers has."""

from transformers import PreTrainedConfig

from model.config import ModelConfig


class BraidConfig(PreTrainedConfig):
    """shape: the fields of a ModelConfig. The other names are what transformers and lm-eval look for."""

    model_type = "braid"

    def __init__(self, shape=None, **kwargs):
        self.shape = shape
        if shape is not None:
            config = ModelConfig(**shape)
            self.vocab_size, self.hidden_size = config.vocab_size, config.d_model
            self.num_hidden_layers, self.max_position_embeddings = config.n_layers, config.seq_len
            self.num_attention_heads = config.n_heads
        super().__init__(**kwargs | {"tie_word_embeddings": False})  # where they are tied, HybridLM has one matrix
