"""Our network as a model of transformers, for the shapes that none of its own classes has.

model.export puts this file, and those that it imports, beside the weights; trust_remote_code=True loads them.
"""

from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from model.config import ModelConfig
from model.configuration_braid import BraidConfig
from model.generate import prefill
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
        """Logits (b, l, vocab), or of the last `logits_to_keep` positions (an int; 0: of all).

        Padding, 0 in attention_mask (b, l), may stand anywhere without a cache. A prompt with padding gets a cache if
        the padding is on the left and the logits of the last position alone are asked for, as generate does it.
        Raises ValueError for padding in other places.
        """
        new = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
        padded = new is not None and not new.all()
        if padded and use_cache:
            if past_key_values is not None or logits_to_keep != 1 or (new.diff(dim=1) < 0).any():
                raise ValueError("with a cache, padding may stand only on the left of the first call's prompts")
            prompts = [row[mask.bool()].tolist() for row, mask in zip(input_ids, new, strict=True)]
            logits, state = prefill(self.model, prompts)
            return CausalLMOutputWithPast(
                logits=logits[:, None], past_key_values=BraidCache(state, input_ids.shape[1])
            )
        seen = 0 if past_key_values is None else past_key_values.length
        state = None
        if use_cache or past_key_values is not None:
            state = self.model.new_state() if past_key_values is None else past_key_values.state
            state = [dict(layer) for layer in state]  # the cache that came in stays as it was
        # padding becomes a document of its own, which the others cannot see
        hidden = self.model.hidden(input_ids, document_ids=new.long() if padded else None, state=state)
        logits = self.model.logits(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        cache = BraidCache(state, seen + input_ids.shape[1]) if use_cache else None
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

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
