"""Text from a model, a token at a time, carried by the recurrent state and the key/value cache."""

import torch


def choose(logits, temperature, top_k, top_p, generator):
    """A token id from logits (vocab,). temperature 0 takes the likeliest; top_k 0 and top_p 1 cut nothing off.

    top_p keeps the fewest tokens whose probabilities reach it (nucleus sampling, arXiv:1904.09751).
    """
    if temperature == 0:
        return int(logits.argmax())
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, len(logits))).values[-1], -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= top_p
        probabilities[order[beyond]] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))


@torch.inference_mode()
def generate(
    model, prompt_ids, max_tokens, *, temperature=0.8, top_k=0, top_p=1.0, stop_ids=(), seed=0, vocab_size=None
):
    """Yield up to max_tokens ids that continue prompt_ids (not empty); ends before an id in stop_ids.

    vocab_size: the tokenizer's; ids from it on only pad the head and are never chosen. The same seed gives the same
    text on the same device. Raises ValueError for a setting out of range.
    """
    if not prompt_ids:
        raise ValueError("the prompt has no tokens; begin with the separator")
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature {temperature}, top_k {top_k}, top_p {top_p}: "
            "allowed are temperature >= 0, top_k >= 0, 0 < top_p <= 1"
        )
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    state, tokens = model.new_state(), list(prompt_ids)
    for _ in range(max_tokens):
        logits, state = model.step(torch.tensor([tokens], device=device), state)
        token = choose(logits[0, -1, :vocab_size], temperature, top_k, top_p, generator)
        if token in stop_ids:
            return
        yield token
        tokens = [token]
