"""Our network as a model of transformers, for the shapes that none of its own classes has.

model.export puts this file, and those that it imports, beside the weights; trust_remote_code=True loads them.
"""

import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from model.config import ModelConfig
from model.configuration_braid import BraidConfig
from model.hybrid import HybridLM


class BraidCache:
    """The decoding state of a batch, and how many tokens it has seen."""

    def __init__(self, state, length):
        self.state, self.length = state, length

    def get_seq_length(self, layer_idx=0):
        return self.length


class BraidForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = BraidConfig
    _is_stateful = True  # the state cannot be taken back by some tokens, so no assisted generation

    def __init__(self, config):
        super().__init__(config)
        self.model = HybridLM(ModelConfig(**config.shape), kernels="torch")
        self.post_init()

    def _init_weights(self, module):
        """HybridLM has initialised itself."""

    def get_input_embeddings(self):
        return self.model.embedding

    def forward(
        self,
        input_ids,
        attention_mask=None,
        past_key_values=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """Logits (b, l, vocab), or of the last `logits_to_keep` positions. Padding may stand on the right alone.

        A causal model does not see what stands on its right, so the logits of padding are the only ones that mean
        nothing; in generation prompts must be of one length. Raises ValueError for padding elsewhere.
        """
        if attention_mask is not None and not attention_mask.all():
            left = attention_mask.diff(dim=1).gt(0).any()
            if left or past_key_values is not None or use_cache:
                raise ValueError(
                    "padding on the left or inside a row is not supported, and none at all in generation; "
                    "generate from one prompt at a time, or from prompts of one length"
                )
        state = self.model.new_state() if past_key_values is None else past_key_values.state
        if use_cache:
            state = [dict(layer) for layer in state]
            length = input_ids.shape[1] + (0 if past_key_values is None else past_key_values.length)
            past_key_values = BraidCache(state, length)
        elif past_key_values is None:
            state = None
        hidden = self.model.hidden(input_ids, state=state)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
        logits = self.model.logits(hidden[:, logits_to_keep if torch.is_tensor(logits_to_keep) else keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values if use_cache else None)

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, use_cache=True, **kwargs
    ):
        seen = 0 if past_key_values is None else past_key_values.length
        return {
            "input_ids": input_ids[:, seen:] if use_cache else input_ids,
            "past_key_values": past_key_values,
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            "logits_to_keep": 1,
        }

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False  # ours is made at the first forward pass
