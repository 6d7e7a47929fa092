"""The models that can be scored, behind one interface: our checkpoints, and causal models of transformers.

    load_model("runs/demo/checkpoints/step_0001600", device="cpu")
    load_model("EleutherAI/pythia-1.4b", device="cuda", dtype="bfloat16")      or a folder, such as model.export writes

What a Scorer uses of either: seq_len, vocab_size (of the head), prefix_id, shares (whether a beginning is read once),
encode, encode_plain, decode, and
batch_size, max_scored (places in a forward pass) and
read(rows, state, places, keep) -> features, state: reads rows of ids, padded to one length, behind `state` (None: from
the beginning), which stays as it was. features (n, ...) at places, counted through the padded rows, alone; the state
behind each row's end, None unless keep, for which the rows must be equally long unless the model is `ragged`.
logits(features) -> (n, vocab) in float32.
take(state, rows) -> state of these rows. write(prompts, n_tokens, until) -> [ids], by the likeliest token.
wait_for_others(): called by every process when its share is done.
"""

import copy
import hashlib
import json
import re
import sys
from contextlib import contextmanager
from functools import lru_cache
from inspect import signature
from pathlib import Path

import torch
import torch.nn.functional as F
from lm_eval.models.utils import resolve_max_length
from torch import nn

from curation.merges import CUT
from curation.shards import file_sha256
from curation.tokenizer import load_tokenizer
from model.config import get_preset
from model.decode import Decoder
from model.scorer import BATCH_SIZE, MAX_LOGITS, padded, rows_that_fit, to_device
from model.weights import MANIFEST, load_checkpoint, newest_checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PARAGRAPH = re.compile(rf"(?:{CUT.pattern})(?=\n\n)")
FILES = (".json", ".safetensors", ".model", ".txt")  # of a Hugging Face folder that are read
STATES = 1 << 34  # bytes that the rows of a forward pass on a GPU may keep
SAME = 1e-3  # of the largest log-probability's size: a cache that continues wrongly is off by far more


def load_model(spec, *, device, dtype=None, size=None):
    """An OwnModel or HFModel from a checkpoint folder, a Hugging Face folder, or a name on the Hub.

    dtype: "float32" or "bfloat16"; None: float32 on a CPU, bfloat16 on a GPU; logits are float32 in either. size: what
    the model is said to be, one of our presets; ValueError if it is of another. Raises FileNotFoundError or ValueError
    with one line for what is no model.
    """
    dtype = dtype or ("float32" if torch.device(device).type == "cpu" else "bfloat16")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    if size is not None:
        get_preset(size)  # refuses an unknown one before anything is fetched
    if torch.device(device).type == "cuda" and torch.device(device).index is not None:
        torch.cuda.set_device(device)  # or every process would keep a context on the first GPU too
    path = Path(spec)
    if (path / MANIFEST).is_file() or newest_checkpoint(path):  # a run is refused with the name of its newest
        checkpoint = load_checkpoint(path)
        check_size(spec, size, checkpoint.model_config.n_parameters, exact=True)
        model, tokenizer = checkpoint.load_model(device), load_tokenizer(checkpoint.tokenizer_path)
        return OwnModel(model, tokenizer, dtype=dtype, name=str(spec), sha256=checkpoint.sha256)
    model = open_hf(spec, path, device, dtype)
    check_size(spec, size, model.n_parameters, exact=False)
    return model


def check_size(spec, size, found, exact):
    """size None: any will do. exact: of the same shape; else within a fifth, as models of other families that go by
    the same number are.
    """
    if size is None:
        return
    expected = get_preset(size).n_parameters
    if abs(found - expected) > (0 if exact else 0.2 * expected):
        raise ValueError(f"{spec} has {found:,} parameters, but size {size} has {expected:,}; give its own size")


class OwnText:
    """How our models read: every text starts with the separator, as every document does in training."""

    def __init__(self, tokenizer, seq_len):
        self.tokenizer, self.seq_len, self.prefix_id = tokenizer, seq_len, tokenizer.separator_id
        self.encode_examples = lru_cache(maxsize=256)(tokenizer.encode)

    def encode(self, text):
        return [self.prefix_id, *self.encode_plain(text)]

    def encode_plain(self, text):
        if self.tokenizer.engine != "tiktoken":  # another library's tokens may reach over a cut
            return self.tokenizer.encode(text)
        cut = last_cut(text)  # a few-shot prompt's examples come with hundreds of questions
        return [*self.encode_examples(text[:cut]), *self.tokenizer.encode(text[cut:])]

    def decode(self, ids):
        return self.tokenizer.decode(ids)


def last_cut(text):
    """Where the last paragraph begins before which no token can reach over, or 0."""
    at = text.rfind("\n\n")
    while at > 0 and not PARAGRAPH.match(text, at - 1):
        at = text.rfind("\n\n", 0, at + 1)
    return max(at, 0)


class OwnModel(OwnText):
    """A HybridLM with its tokenizer."""

    kind, shares, ragged, max_scored = "braid", True, True, sys.maxsize

    def __init__(self, model, tokenizer, *, dtype="float32", name="model", sha256=None):
        super().__init__(tokenizer, model.config.seq_len)
        self.name, self.sha256, self.dtype = name, sha256, dtype
        self.n_parameters, self.vocab_size = model.config.n_parameters, model.config.vocab_size
        # in float32 whatever the network's dtype: bfloat16 logits tie, or flip, close choices
        self.head = model.head_weight.detach().float()
        self.model = model.to(DTYPES[dtype])
        self.decoder = Decoder(self.model, logits=self.logits)

    @property
    def device(self):
        return self.head.device

    @property
    def batch_size(self):
        """Rows that a forward pass has if nobody says how many: on a GPU, as many as STATES holds states of."""
        if self.device.type == "cpu":
            return BATCH_SIZE
        return rows_that_fit(self.model.config, STATES, DTYPES[self.dtype].itemsize)

    def read(self, rows, state, places, keep):
        tokens, lengths = padded(rows, self.prefix_id, self.device)
        if state is not None or keep:
            state = self.model.going_on(state, lengths if keep else None)
        hidden = self.hidden(tokens, state).flatten(0, 1)
        return hidden[to_device(places, self.device)], state if keep else None

    @torch.inference_mode()
    def hidden(self, tokens, state):
        return self.model.hidden(tokens, state=state)

    def wait_for_others(self):
        """Processes that share nothing but results need not wait."""

    def logits(self, hidden):
        return F.linear(hidden.float(), self.head)

    def take(self, state, rows):
        return self.model.take_rows(state, to_device(rows, self.device))

    @torch.inference_mode()
    def write(self, prompts, n_tokens, until):
        """[ids] after each prompt: of any lengths, but not of one token among longer ones."""
        state = None
        if len(prompts[0]) > 1:
            _, state = self.read([prompt[:-1] for prompt in prompts], None, [], keep=True)
        self.decoder.start(state, room=max(n_tokens), n_rows=len(prompts))
        tokens = to_device([prompt[-1] for prompt in prompts], self.device)
        written, rows = [[] for _ in prompts], list(range(len(prompts)))
        going = set(rows)
        while going:
            tokens = self.decoder.step(tokens)[:, : self.tokenizer.vocab_size].argmax(-1)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                if row not in going:
                    continue
                if token != self.prefix_id:
                    written[row].append(token)
                full = len(written[row]) >= n_tokens[row]
                if token == self.prefix_id or full or ends_with(self.decode, written[row], until):
                    going.remove(row)
            if going and 2 * len(going) <= len(rows):  # a graph is of so many rows, and another takes time to record
                keep = [i for i, row in enumerate(rows) if row in going]
                self.decoder.take(keep)
                rows, tokens = [rows[i] for i in keep], tokens[to_device(keep, self.device)]
        return written


def ends_with(decode, ids, until):
    """Whether one of the strings stands in the text of the last ids. A token has at least a byte."""
    tail = decode(ids[-(max((len(stop.encode()) for stop in until), default=0) + 4) :])
    return any(stop in tail for stop in until)


# ---- transformers


class ExportedTokenizer:
    """The tokenizer of a folder that model.export wrote, as a checkpoint's is."""

    engine = "transformers"

    def __init__(self, tokenizer):
        self.tokenizer, self.separator_id = tokenizer, tokenizer.bos_token_id
        self.vocab_size = 1 + max(tokenizer.get_vocab().values())

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def open_hf(spec, path, device, dtype):
    """The HFModel of a folder, or of a name on the Hub, whose files are fetched into its cache first."""
    from huggingface_hub import snapshot_download
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    from model.modeling_braid import BraidConfig, BraidForCausalLM

    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(
                f"{spec} is no model: neither a checkpoint of ours ({MANIFEST}) nor of Hugging Face (config.json)"
            )
    elif path.is_absolute() or str(spec).count("/") != 1 or str(spec).startswith((".", "runs/", "exports/")):
        raise FileNotFoundError(
            f"{spec} does not exist; give a checkpoint folder, a Hugging Face folder or a name on the Hub"
        )
    else:
        try:
            path = Path(snapshot_download(str(spec), allow_patterns=[f"*{suffix}" for suffix in FILES]))
        except Exception as error:  # the Hub's client has a dozen kinds, and all of them mean this
            reason = str(error).splitlines()[0]
            raise FileNotFoundError(f"{spec} is neither a folder here nor to be had from the Hub: {reason}") from None
    named = {"name": str(spec), "sha256": folder_sha256(path)}
    try:
        # code that lies beside weights is never run: what our export would bring along is here already
        if json.loads((path / "config.json").read_bytes()).get("model_type") == BraidConfig.model_type:
            model = BraidForCausalLM.from_pretrained(path).model.to(device).eval()
            tokenizer = ExportedTokenizer(PreTrainedTokenizerFast.from_pretrained(path))
            return OwnModel(model, tokenizer, dtype=dtype, **named)
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype]).to(device).eval()
        return HFModel(model, tokenizer, dtype=dtype, **named)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{spec} cannot be scored: {' '.join(str(error).split())}") from None


def folder_sha256(path):
    """Identity of a model's folder: of the names and contents of its files."""
    files = sorted(file for file in path.iterdir() if file.suffix in FILES)
    whole = "".join(f"{file.name} {file_sha256(file)}\n" for file in files)
    return hashlib.sha256(whole.encode()).hexdigest()


class HFModel:
    """A causal model of transformers with its tokenizer; texts begin as the tokenizer begins them.

    shares is tried out: whether the model, given back what it kept of a beginning, predicts what it does of the whole.
    """

    kind, ragged, batch_size = "transformers", False, BATCH_SIZE

    def __init__(self, model, tokenizer, *, dtype="float32", name="model", sha256=None):
        self.name, self.sha256, self.dtype, self.tokenizer, self.model = name, sha256, dtype, tokenizer, model
        self.n_parameters = sum(weight.numel() for weight in model.parameters())
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.prefix_id, self.end_id = eos if bos is None else bos, eos
        if self.prefix_id is None:
            raise ValueError(f"the tokenizer of {name} has neither a BOS nor an EOS token, so no text can begin")
        self.seq_len = resolve_max_length(model.config, tokenizer)
        # what a model calls what it keeps
        self.cache_name = (
            "cache_params" if "cache_params" in signature(model.forward).parameters else "past_key_values"
        )
        head = model.get_output_embeddings()
        if head is None:
            raise ValueError(f"{type(model).__name__} has no head that transformers knows of")
        self.head = ScoredHead(head.weight.detach().float(), None if head.bias is None else head.bias.detach().float())
        self.plain_head = head
        self.vocab_size = head.weight.shape[0]
        self.shares = self.goes_on_exactly()

    @property
    def device(self):
        return self.model.device

    def encode(self, text):
        return self.tokenizer.encode(text)

    def encode_plain(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def read(self, rows, state, places, keep):
        tokens, _ = padded(rows, self.prefix_id, self.device)
        kept = {self.cache_name: copy.deepcopy(state)}  # a model changes what it is given
        with self.scored_at(to_device(places, self.device)):
            result = self.model(tokens, use_cache=keep or state is not None, **kept)
        return result.logits, getattr(result, self.cache_name, None) if keep else None

    def logits(self, features):
        return features  # a model may change its logits, so they come from it

    @property
    def max_scored(self):
        return max(1, MAX_LOGITS // self.vocab_size)

    def wait_for_others(self):
        """Processes that share nothing but results need not wait."""

    @contextmanager
    def scored_at(self, places):
        """The head in float32 on these places alone; what the model does to its logits afterwards stays."""
        self.head.places = places
        self.model.set_output_embeddings(self.head)
        try:
            yield
        finally:
            self.model.set_output_embeddings(self.plain_head)

    def take(self, state, rows):
        state = copy.deepcopy(state)
        state.reorder_cache(torch.tensor(rows, device=self.device))
        return state

    @torch.inference_mode()
    def goes_on_exactly(self):
        """Whether reading 13 tokens behind 11 others, in two rows branched off one, is reading all 24."""
        ids = torch.arange(24).mul(7).add(3).remainder(self.vocab_size).tolist()
        other = ids[:11] + ids[:10:-1]
        try:
            _, state = self.read([ids[:11]], None, [], keep=True)
            parted, _ = self.read([ids[11:], other[11:]], self.take(state, [0, 0]), range(26), keep=False)
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return False
        whole, _ = self.read([ids, other], None, [*range(11, 24), *range(35, 48)], keep=False)
        parted, whole = parted.log_softmax(-1), whole.log_softmax(-1)
        tolerance = SAME if self.dtype == "float32" else 0.1
        return bool(((parted - whole).abs() <= tolerance * whole.abs().amax()).all())

    @torch.inference_mode()
    def write(self, prompts, n_tokens, until):
        length = max(map(len, prompts))
        tokens = torch.tensor([[self.prefix_id] * (length - len(ids)) + ids for ids in prompts], device=self.device)
        mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts], device=self.device)
        made = self.model.generate(
            input_ids=tokens, attention_mask=mask, max_new_tokens=max(n_tokens), do_sample=False,
            pad_token_id=self.prefix_id, stop_strings=list(until) or None, tokenizer=self.tokenizer,
        )[:, length:].tolist()  # fmt: skip
        written = []
        for ids, most in zip(made, n_tokens, strict=True):
            ids = ids[: ids.index(self.end_id)] if self.end_id in ids else ids
            written.append(ids[:most])
        return written


class ScoredHead(nn.Module):
    """The model's own head, in float32, on the hidden states at `places` alone: (n, vocab), not (b, l, vocab)."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias, self.places = weight, bias, None

    def forward(self, hidden):
        return F.linear(hidden.flatten(0, 1)[self.places].float(), self.weight, self.bias)
