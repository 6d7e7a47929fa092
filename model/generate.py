"""Text from a model, a token at a time, carried by the recurrent state and the key/value cache.

for token in generate(model, [separator, 17, 4], 100, temperature=0.7, min_p=0.05): ...
texts = generate_batch(model, prompts, 100, temperature=0)
"""

from dataclasses import dataclass

import torch

from model.attention import KVCache
from model.decode import Decoder

ROOM = 1024  # tokens that a cache has room for at the start, at most; texts may become longer
DRAWS = 256  # random numbers that a row draws at once


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn from the model's distribution. ValueError, in one line, for a setting out of range.

    The settings act in the order in which they stand here, which is transformers' own.
    """

    # fmt: off
    repetition_penalty: float = 1.0  # divides a seen token's logit, or multiplies one below 0 (arXiv:1909.05858)
    temperature: float = 0.8         # divides the logits; 0 takes the likeliest
    top_k: int = 0                   # keep so many likeliest; 0 keeps all
    top_p: float = 1.0               # keep the fewest likeliest whose probabilities reach it (arXiv:1904.09751)
    min_p: float = 0.0               # keep what has this part of the likeliest's probability (arXiv:2407.01082)
    # fmt: on

    def __post_init__(self):
        for name, good, allowed in (
            ("repetition_penalty", self.repetition_penalty > 0, "above 0; 1 does nothing"),
            ("temperature", self.temperature >= 0, "0 or more; 0 takes the likeliest"),
            ("top_k", self.top_k >= 0, "0 or more; 0 keeps all"),
            ("top_p", 0 < self.top_p <= 1, "0 < top_p <= 1; 1 keeps all"),
            ("min_p", 0 <= self.min_p <= 1, "0 <= min_p <= 1; 0 keeps all"),
        ):
            if not good:
                raise ValueError(f"{name} {getattr(self, name)} is out of range; allowed: {allowed}")


def probabilities(logits, sampling, seen=None):
    """Of each row's next token, (b, vocab), from logits (b, vocab); seen (b, vocab): True for a row's tokens so far.

    With temperature 0, all on the likeliest.
    """
    if sampling.repetition_penalty != 1:
        penalized = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = torch.where(seen, penalized, logits)
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / sampling.temperature
    if sampling.top_k:
        least = logits.topk(min(sampling.top_k, logits.shape[1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter_(1, order, beyond), -torch.inf)
    chances = logits.softmax(-1)
    if sampling.min_p:
        chances = chances.masked_fill(chances < sampling.min_p * chances.amax(-1, keepdim=True), 0)
        chances = chances / chances.sum(-1, keepdim=True)
    return chances


def generate(model, prompt_ids, max_tokens, *, stop_ids=(), seed=0, vocab_size=None, decoder=None, **sampling):
    """Yield up to max_tokens ids that continue prompt_ids (not empty); ends before an id in stop_ids.

    vocab_size: the tokenizer's; ids from it on only pad the head and are never chosen. sampling: fields of Sampling.
    The same seed gives the same text on the same device. Raises ValueError for a setting out of range.
    decoder: a Decoder of the model that no other text is using, so that one graph serves many texts on a GPU.
    """
    for (token,) in _decode(model, [prompt_ids], max_tokens, [seed], vocab_size, decoder, Sampling(**sampling)):
        if token in stop_ids:
            return
        yield token


def generate_batch(model, prompts, max_tokens, *, stop_ids=(), seed=0, vocab_size=None, decoder=None, **sampling):
    """[ids] that continue each of the prompts, of any lengths, decoded together.

    Row i is what generate gives for prompts[i] alone with seed + i, but for rounding: the sums of a larger batch may
    be taken in another order.
    """
    written, going = [[] for _ in prompts], set(range(len(prompts)))
    seeds = [seed + i for i in range(len(prompts))]
    for tokens in _decode(model, prompts, max_tokens, seeds, vocab_size, decoder, Sampling(**sampling)):
        for i in sorted(going):
            if tokens[i] in stop_ids:
                going.remove(i)
            else:
                written[i].append(tokens[i])
        if not going:
            break
    return written


@torch.inference_mode()
def _decode(model, prompts, max_tokens, seeds, vocab_size, decoder, sampling):
    """Yield the next id of every row, [int], up to max_tokens times."""
    if not all(prompts):
        raise ValueError("the prompt has no tokens; begin with the separator")
    if not prompts or max_tokens < 1:
        return
    device = next(model.parameters()).device
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    logits, state = prefill(model, prompts)
    logits = logits[:, :vocab_size]
    seen = torch.zeros_like(logits, dtype=torch.bool)
    for row, prompt in zip(seen, prompts, strict=True):
        row[torch.tensor([token for token in prompt if token < seen.shape[1]], device=device, dtype=torch.long)] = True
    decoder = decoder or Decoder(model)
    for made in range(max_tokens):
        chances = probabilities(logits, sampling, seen)
        if sampling.temperature == 0:
            tokens = chances.argmax(-1)
        else:
            if made % DRAWS == 0:
                rows = [torch.rand(DRAWS, generator=g, device=device, dtype=torch.float64) for g in generators]
                draws = torch.stack(rows)
            tokens = pick(chances, draws[:, made % DRAWS])
        yield tokens.tolist()
        if made == max_tokens - 1:
            return
        if made == 0:
            decoder.start(state, room=min(max_tokens, ROOM))
        if sampling.repetition_penalty != 1:
            seen.scatter_(1, tokens[:, None], True)
        logits = decoder.step(tokens)[:, :vocab_size]


def pick(chances, draws):
    """The id, (b,), that each row's draw (b,) from [0, 1) falls on; an id is as wide as its chance (b, vocab)."""
    upto = chances.double().cumsum(-1)
    return torch.searchsorted(upto, draws[:, None] * upto[:, -1:], right=True)[:, 0]


def prefill(model, prompts):
    """The logits (b, vocab) after each prompt, and one state from which all of them go on.

    Prompts of one length run together and others apart, so that no padding enters a convolution or a scan; only the
    finished key/value caches are padded, on the left, and each row's mask leaves the padding out.
    """
    device = next(model.parameters()).device
    lengths = [len(prompt) for prompt in prompts]
    order, logits, states = [], [], []
    for length in sorted(set(lengths)):
        rows = [i for i in range(len(prompts)) if lengths[i] == length]
        tokens = torch.tensor([prompts[i] for i in rows], device=device)
        last, state = model.step(tokens, model.new_state(), last=True)
        order += rows
        logits.append(last[:, 0])
        states.append(state)
    back = torch.tensor(order, device=device).argsort()
    return torch.cat(logits)[back], [_stack(layer, back) for layer in zip(*states, strict=True)]


def _stack(layers, rows):
    """One layer's states of several batches as the state of one batch, its rows in the order of `rows`."""
    return {
        name: KVCache.stack([layer[name] for layer in layers], rows)
        if name == "cache"
        else torch.cat([layer[name] for layer in layers])[rows]
        for name in layers[0]
    }
