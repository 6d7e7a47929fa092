"""Writing on, a token a step for every row, in tensors that stay where they are: on a GPU, one CUDA graph a step.

    logits, state = prefill(model, prompts)    # model/generate.py
    decoder = Decoder(model)
    decoder.start(state)
    logits = decoder.step(tokens)              # (b,) -> (b, vocab), as often as wanted

Started one by one from Python, the kernels of a token take 20 to 35 ms whatever the model's size (H200).
"""

import torch

from model.attention import alibi_slopes, rope_frequencies
from model.layers import FixedState

ROOM = 256  # what a cache's capacity is rounded up to, so that the next text is likely to fit it


class Decoder:
    """Goes on from a decoding state of a HybridLM; the state itself stays as it was.

    logits: what to make of the last hidden states, (b, d), in a step; None: the model's own logits.
    A decoder reads the weights where they were when it started: after new values in the same tensors it goes on with
    them, after model.to(...) it has to start again. One that is started again keeps its graph where the number of rows
    is the same and the longest row fits. Modules with hooks run without a graph.
    """

    def __init__(self, model, logits=None):
        self.model, self.make_logits = model, logits or model.logits
        self.state, self.graph, self.addresses = None, None, None
        self.n_rows = self.capacity = self.longest = 0

    @torch.inference_mode()
    def start(self, state=None, room=ROOM, n_rows=1):
        """Take over a state of HybridLM.step or `prefill`, with room for so many more tokens.

        Rows may be of different lengths. Once the room is used up, more is made. state None: n_rows rows that have
        read nothing.
        """
        rows = [_rows(layer) for layer in state or []]
        if rows:
            n_rows = len(next(iter(rows[0].values())))
        lengths = next((layer["lengths"] for layer in rows if "lengths" in layer), [0] * n_rows)
        self._make_room(n_rows, max(lengths) + room)
        self.longest = max(lengths)
        self.lengths.copy_(torch.tensor(lengths))
        for kept, layer in zip(self.state, rows or [None] * len(self.state), strict=True):
            if layer is None:
                for name in ("conv", "ssm"):
                    if name in kept:
                        kept[name].zero_()
            elif "conv" in layer:
                kept["ssm"].copy_(layer["ssm"])
                width = kept["conv"].shape[1]
                back = torch.arange(1 - width, 0, device=self.lengths.device)
                slots = (self.lengths[:, None] + back) % width  # of the inputs before this token
                kept["conv"][torch.arange(n_rows, device=slots.device)[:, None], slots] = layer["conv"]
            else:
                for row, n in enumerate(lengths):
                    kept["keys"][row, :n], kept["values"][row, :n] = layer["keys"][row], layer["values"][row]

    @torch.inference_mode()
    def step(self, tokens):
        """The logits after tokens (b,), the next of each row. The following step writes over them."""
        if self.longest == self.capacity and "A" in self.model.config.layer_pattern:
            self.take(range(self.n_rows), room=self.capacity)
        self.tokens.copy_(tokens.view(-1, 1))
        self.longest += 1
        if self.graph is None:
            return self._run()
        self.graph.replay()
        return self.logits

    @torch.inference_mode()
    def take(self, rows, room=0):
        """Go on with these rows (indices) alone, in this order, and with room for so many more tokens than before."""
        rows = torch.tensor(list(rows), device=self.lengths.device)
        before, lengths = self.state, self.lengths[rows]
        self._make_room(len(rows), self.capacity + room)
        self.lengths.copy_(lengths)
        for kept, layer in zip(self.state, before, strict=True):
            for name in ("conv", "ssm"):
                if name in kept:
                    kept[name].copy_(layer[name][rows])
            for name in ("keys", "values"):
                if name in kept:
                    kept[name][:, : self.longest] = layer[name][rows, : self.longest]

    def _make_room(self, n_rows, capacity):
        """Have tensors, and on a GPU a graph, for so many rows and tokens."""
        addresses = [weight.data_ptr() for weight in self.model.parameters()]
        if n_rows == self.n_rows and capacity <= self.capacity and addresses == self.addresses:
            return
        self.graph = self.logits = None  # frees the graph's memory before more is taken
        self.n_rows, self.capacity, self.addresses = n_rows, -(-capacity // ROOM) * ROOM, addresses
        weight = self.model.embedding.weight
        self.tokens = torch.zeros(n_rows, 1, dtype=torch.long, device=weight.device)
        self.lengths = torch.zeros(n_rows, dtype=torch.long, device=weight.device)
        self.state = [self._buffers(kind, weight) for kind in self.model.config.layer_pattern]
        if weight.is_cuda and not has_hooks(self.model):
            with torch.cuda.device(weight.device):
                self._capture()

    def _buffers(self, kind, like):
        """The empty FixedState of an M or A layer."""
        config, b = self.model.config, self.n_rows
        if kind == "M":
            return FixedState(
                conv=like.new_zeros(b, config.d_conv, config.d_conv_channels),
                ssm=like.new_zeros(
                    b, config.n_mamba_heads, config.d_state, config.mamba_head_dim, dtype=torch.float32
                ),
                lengths=self.lengths,
            )
        cache = like.new_zeros(2, b, self.capacity, config.n_kv_heads, config.head_dim)
        state = FixedState(keys=cache[0], values=cache[1], lengths=self.lengths)
        if config.positions == "rope":
            state["frequencies"], state["magnitude"] = rope_frequencies(config, like.device)
        elif config.positions == "alibi":
            state["slopes"] = alibi_slopes(config.n_heads, like.device)
        return state

    def _run(self):
        hidden = self.model.hidden(self.tokens, state=self.state)
        self.lengths += 1
        return self.make_logits(hidden[:, 0])

    def _capture(self):
        """Record a step as a graph. What the steps before it do to the state is written over by what follows."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles kernels and has libraries take their workspaces, which a graph cannot hold
                self._run()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self._run()


def has_hooks(model):
    """Whether anything else is to run with the modules, as ZeRO-3's gathering does: a graph would leave it out."""
    return any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def _rows(layer):
    """A layer's state of HybridLM.step; of a cache, {"lengths": [int], "keys" and "values": one (n, k, p) a row}."""
    if "cache" not in layer:
        return layer
    cache = layer["cache"]
    starts = [0] * len(cache.keys) if cache.start is None else cache.start.tolist()
    keys, values = ([t[row, start:] for row, start in enumerate(starts)] for t in (cache.keys, cache.values))
    return {"keys": keys, "values": values, "lengths": [cache.length - start for start in starts]}
