"""Log-probabilities of many texts, where a beginning that texts share is read once, and greedy continuations.

    scorer = Scorer(load_model("runs/demo/checkpoints/step_0001600", device="cpu"))
    [answer] = scorer.loglikelihoods([("The capital of France is", " Paris")])

The texts make a tree: a node is a stretch of tokens that all texts below it have in common. What a model keeps of the
tokens behind it (keys and values, the convolution's last inputs, the scan's state) is copied where the tree branches.
"""

import hashlib
import json
import sys
from base64 import b64decode, b64encode
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

MIN_SAVED_TOKENS = 12  # and MIN_SAVED of what would be read: a stretch that saves less than either costs more, in
MIN_SAVED = 1 / 12  # smaller batches, than it spares
BATCH_SIZE = 64  # texts in a forward pass
PREFIX_TOKENS = 1024  # that a row keeps, when it is counted how many rows fit
MAX_POSITIONS = 1 << 15  # of one forward pass, padding included; one text may have more
MAX_PADDING = 2048  # positions: about as many as a GPU reads in the time that it takes to begin another pass
MAX_LOGITS = 1 << 27  # at a time: 512 MiB in float32
NOT_FINITE = (
    "the model gives a log-probability that is not finite, so no score of it means anything; "
    "its weights have diverged or are damaged: take an earlier checkpoint"
)


class NotFinite(ValueError):
    """A model's log-probabilities are not numbers."""


@dataclass(frozen=True)
class Answer:
    """nats of a continuation; greedy: at each of its tokens no other is as likely; how many tokens it has."""

    nats: float
    greedy: bool
    n_tokens: int


@dataclass(eq=False)
class Node:
    """tokens that follow the parent's. scored: (place in tokens, the token that comes next, the slot of its score)."""

    tokens: list[int]
    scored: list[tuple[int, int, int]]
    children: list["Node"] = field(default_factory=list)

    @property
    def n_texts(self):
        """Leaves below, or itself."""
        return sum(child.n_texts for child in self.children) or 1

    @property
    def n_tokens(self):
        return len(self.tokens) + sum(child.n_tokens for child in self.children)

    @property
    def slots(self):
        """Of all scores at and below this node, in a fixed order."""
        return [slot for _, _, slot in self.scored] + [slot for child in self.children for slot in child.slots]

    @property
    def content(self):
        return [self.tokens, self.scored, [child.content for child in self.children]]


@dataclass(frozen=True)
class Job:
    """Nodes that are read in one forward pass, with all below them, behind the nodes of `trunk`, which come first.

    The unit that is handed to a process and kept when a run is killed. What is in a job does not depend on how many
    processes there are, so neither do its scores, to the last bit.
    """

    trunk: tuple[Node, ...]
    nodes: list[Node]

    @cached_property
    def slots(self):
        return np.array([slot for node in self.nodes for slot in node.slots], int)

    @cached_property
    def n_tokens(self):
        return sum(node.n_tokens for node in self.nodes)

    @property
    def sha256(self):
        content = [[node.tokens for node in self.trunk], [node.content for node in self.nodes]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


class Scorer:
    """One way of asking a model: a checkpoint's or transformers' (eval/models.py), or one in training (train/quiz.py).

    batch_size: texts in a forward pass, None: model.batch_size. answers: an AnswerFile (eval/answers.py) that keeps
    what is done, or None. quiet: no progress bar.
    forward_tokens: what the model read, without padding; forward_tokens_hf: what lm-eval's hf model would have, which
    reads a text for each different context and continuation but the continuation's last token. n_truncated: prompts
    that lost their beginning because they were longer than the model's seq_len.
    With torch.distributed set up, every process calls the same methods with the same requests and gets all answers.
    """

    def __init__(self, model, *, batch_size=None, max_positions=MAX_POSITIONS, answers=None, quiet=False):
        self.model, self.max_positions, self.answers, self.quiet = model, max_positions, answers, quiet
        self.batch_size = batch_size or model.batch_size
        self.forward_tokens = self.forward_tokens_hf = self.n_truncated = 0
        self._encoded, self._pairs = {}, {}  # of the requests at hand: a context comes with many continuations
        self._trunk = []  # (node, state behind it): where the last job went on from

    # ---- requests

    def loglikelihoods(self, requests, what="scoring", theirs=None):
        """[Answer] of each (context, continuation). theirs: the requests that lm-eval would make, if not these."""
        pieces = self.pieces(requests)
        known = dict(zip(requests, pieces, strict=True))
        new = [request for request in theirs or () if request not in known]
        known |= zip(new, self.pieces(new, count=False), strict=True)
        asked = requests if theirs is None else theirs
        self.forward_tokens_hf += sum(map(len, {tuple(inputs) for request in asked for inputs, _ in known[request]}))
        self._encoded, self._pairs = {}, {}
        scores = self.score_texts(pieces, what)
        n_tokens = [sum(len(targets) for _, targets in parts) for parts in pieces]
        return [Answer(*score, n) for score, n in zip(scores, n_tokens, strict=True)]

    def pieces(self, requests, count=True):
        """The windows of each (context, continuation), most often one; count: add those cut to n_truncated."""
        pairs = [self.encode_pair(*request) for request in requests]
        for (_, after), (_, continuation) in zip(pairs, requests, strict=True):
            if not after:
                raise ValueError(
                    f"the continuation {continuation!r} adds no token to its context, so it cannot be scored"
                )
        if count:
            self.n_truncated += sum(len(before) + len(after) > self.model.seq_len + 1 for before, after in pairs)
        return [list(windows(before + after, len(before), self.model.seq_len)) for before, after in pairs]

    def encode_pair(self, context, continuation):
        """(context ids, continuation ids) by lm-eval's rule: spaces at the end of the context go to the continuation.

        An empty context is the separator alone, or what the model's tokenizer has for it.
        """
        if context == "":
            ids = self.model.encode_plain(continuation)
            prefix = [self.model.prefix_id]
            return (prefix, ids) if ids[:1] != prefix else (ids[:1], ids[1:])
        if (context, continuation) not in self._pairs:
            stripped = context.rstrip()
            if stripped not in self._encoded:
                self._encoded[stripped] = self.model.encode(stripped)
            ids = self._encoded[stripped]
            whole = self.model.encode(context + continuation)
            self._pairs[context, continuation] = ids, whole[len(ids) :]
        return self._pairs[context, continuation]

    def fits(self, context, continuation):
        context_ids, target_ids = self.encode_pair(context, continuation)
        return len(context_ids) + len(target_ids) <= self.model.seq_len + 1

    # ---- log-probabilities

    def score_texts(self, texts, what="scoring"):
        """[(nats, greedy)] of texts of one or more pieces (see score) each."""
        scores = iter(self.score([piece for pieces in texts for piece in pieces], what))
        parts = [[next(scores) for _ in pieces] for pieces in texts]
        return [(sum(nats for nats, _ in part), all(greedy for _, greedy in part)) for part in parts]

    def score(self, pieces, what="scoring"):
        """[(nats, greedy)] of each (inputs, targets): the targets are predicted by the last inputs.

        Sums are float64 over float32 log-probabilities. Raises ValueError on one that is not finite, since an argmax
        over NaN is choice 0.
        """
        ends = np.cumsum([len(targets) for _, targets in pieces], dtype=int)
        starts = [0, *ends[:-1].tolist()]
        nodes = build_tree(pieces, starts, self.model.shares)
        jobs = list(cut_into_jobs(nodes, self.batch_size, self.batches))
        trunks = {id(node): len(node.tokens) for job in jobs for node in job.trunk}
        self.forward_tokens += sum(trunks.values()) + sum(job.n_tokens for job in jobs)
        nats, greedy = np.zeros(ends[-1] if pieces else 0), np.zeros(ends[-1] if pieces else 0, bool)
        self._trunk = []
        for job, result in zip(jobs, self.run(jobs, self.score_job, what), strict=True):
            nats[job.slots] = np.frombuffer(b64decode(result["nats"]), "<f4")
            bits = np.frombuffer(b64decode(result["greedy"]), np.uint8)
            greedy[job.slots] = np.unpackbits(bits, count=len(job.slots)).astype(bool)
        self._trunk = []
        return [(float(nats[a:b].sum()), bool(greedy[a:b].all())) for a, b in zip(starts, ends, strict=True)]

    def batches(self, nodes):
        return batches(nodes, self.batch_size, self.max_positions, self.model.max_scored, self.model.ragged)

    def run(self, jobs, do, what):
        """[do(job)()] of all jobs, each done by one process or found in the answers that are kept. All ranks.

        do begins a job and returns a function that waits for it and returns what JSON can hold.
        """
        n_ranks = dist.get_world_size() if dist.is_initialized() else 1
        rank = dist.get_rank() if n_ranks > 1 else 0
        mine = [i for i, owner in enumerate(owners(jobs, n_ranks)) if owner == rank]
        try:
            done, problem = self.run_mine(jobs, mine, do, what, quiet=self.quiet or rank > 0), None
        except ValueError as error:
            if n_ranks == 1:
                raise
            done, problem = {}, error
        self.model.wait_for_others()
        if n_ranks > 1:
            gathered = [None] * n_ranks
            dist.all_gather_object(gathered, (done, problem))  # every rank must come here, whatever went wrong
            if problems := [error for _, error in gathered if error]:
                raise problems[0]
            done = {i: result for part, _ in gathered for i, result in part.items()}
        return [done[i] for i in range(len(jobs))]

    # not inference_mode: the weights that ZeRO-3 gathers in it could not be trained on
    @torch.no_grad()
    def run_mine(self, jobs, mine, do, what, quiet):
        done, begun = {}, None  # begun: the job before, which a GPU may still be at while the next is made ready
        every = 0.1 if sys.stderr.isatty() else 10  # seconds; a log file gets a line now and then
        total = sum(jobs[i].n_tokens for i in mine)
        with tqdm(total=total, desc=what, unit="tok", unit_scale=True, mininterval=every, disable=quiet) as bar:

            def end(i, key, wait):
                done[i] = wait()
                if key:
                    self.answers.add(key, done[i])
                bar.update(jobs[i].n_tokens)

            try:
                for i in mine:
                    key = jobs[i].sha256 if self.answers else None
                    if key and (result := self.answers.get(key)) is not None:
                        done[i] = result
                        bar.update(jobs[i].n_tokens)
                        continue
                    before, begun = begun, (i, key, do(jobs[i]))
                    if before:
                        end(*before)
                if begun:
                    end(*begun)
            except torch.cuda.OutOfMemoryError:
                raise ValueError(
                    f"{self.batch_size} texts at once do not fit into the GPU; give a smaller batch size"
                ) from None
        return done

    def score_job(self, job):
        """Begin a job: a function that gives {"nats", "greedy"} of the job's slots, packed."""
        found = []
        self.read(job.nodes, self.state_behind(job.trunk), [0] * len(job.nodes), found)
        slots, *scores = zip(*found, strict=True)
        scores = from_device(torch.stack([torch.cat(parts).float() for parts in scores]))
        slots = np.concatenate(slots)

        def wait():
            nats, greedy = scores()
            if not np.isfinite(nats).all():
                raise NotFinite(NOT_FINITE)
            order = slots.argsort()
            order = order[np.searchsorted(slots, job.slots, sorter=order)]
            nats, greedy = nats[order].astype("<f4"), np.packbits(greedy[order] > 0)
            return {"nats": b64encode(nats).decode(), "greedy": b64encode(greedy).decode()}

        return wait

    def state_behind(self, trunk):
        """The state behind the last node of `trunk`, one row; None before the first token. Each is read alone."""
        keep = 0
        while keep < min(len(trunk), len(self._trunk)) and trunk[keep] is self._trunk[keep][0]:
            keep += 1
        del self._trunk[keep:]
        for node in trunk[keep:]:
            state = self._trunk[-1][1] if self._trunk else None
            _, state = self.model.read([node.tokens], state, [], keep=True)
            self._trunk.append((node, state))
        return self._trunk[-1][1] if self._trunk else None

    def read(self, nodes, state, rows, found):
        """Add the scores at nodes and all below them to `found`. Node i goes on from row rows[i]."""
        inner = bool(nodes[0].children)
        if state is not None:
            state = self.model.take(state, rows)
        length = max(len(node.tokens) for node in nodes)
        asked = [
            (row * length + place, target, slot)
            for row, node in enumerate(nodes) for place, target, slot in node.scored
        ]  # fmt: skip
        asked = np.array(sorted(asked), int).reshape(-1, 3)
        places, at = np.unique(asked[:, 0], return_inverse=True)
        features, state = self.model.read([node.tokens for node in nodes], state, places, keep=inner)
        if len(places):
            found += self.look_up(features, at, *asked[:, 1:].T)
        del features
        if inner:
            children = [(child, row) for row, node in enumerate(nodes) for child in node.children]
            row_of = {id(child): row for child, row in children}
            below = [child for child, _ in children]
            for batch in self.batches(below):
                self.read(batch, state, [row_of[id(child)] for child in batch], found)

    def look_up(self, features, at, targets, slots):
        """Yield (slots, nats, greedy) of targets predicted at the rows `at` of features; at does not descend.

        The logits exist for a stretch of rows at a time. Nothing waits for the GPU.
        """
        n = max(1, MAX_LOGITS // self.model.vocab_size)
        where = to_device(np.stack([at, targets]), features.device)
        for start in range(0, len(features), n):
            part = slice(*np.searchsorted(at, [start, start + n]))
            rows, target = where[0, part] - start, where[1, part]
            logits = self.model.logits(features[start : start + n])
            chosen, best = logits[rows, target], logits.max(-1).values
            alone = (logits == best[:, None]).sum(-1) == 1
            yield slots[part], chosen - logits.logsumexp(-1)[rows], (chosen == best[rows]) & alone[rows]

    # ---- generation

    def generate_until(self, requests):
        """[text] that the model writes after each (context, options), the likeliest token each time.

        options: lm-eval's generation_kwargs: `until`, strings that end the text and are not in it, and max_gen_toks.
        The text also ends with the separator, or where the context and it fill the model's seq_len.
        """
        asked = []
        for i, (context, options) in enumerate(requests):
            until = [options["until"]] if isinstance(options.get("until"), str) else options.get("until", [])
            most = options.get("max_gen_toks", 256)
            ids = self.model.encode(context)
            room = self.model.seq_len - min(most, self.model.seq_len // 2)
            self.n_truncated += len(ids) > room
            ids = ids[-room:]
            asked.append((tuple(until), len(ids), i, ids, min(most, self.model.seq_len - len(ids))))
        jobs = []
        for _, same in groupby(sorted(asked), key=lambda prompt: (prompt[0], prompt[1] == 1)):
            same = list(same)
            jobs += [WritingJob(same[i : i + self.batch_size]) for i in range(0, len(same), self.batch_size)]
        texts = [""] * len(asked)
        for job, result in zip(jobs, self.run(jobs, self.write_job, "writing"), strict=True):
            for (_, n_tokens, i, *_), text, n_written in zip(job.prompts, *result, strict=True):
                texts[i] = text
                self.forward_tokens += n_tokens + n_written
                self.forward_tokens_hf += n_tokens + n_written
        return texts

    def write_job(self, job):
        """A function that gives [texts, the number of tokens of each], done already."""
        until = job.prompts[0][0]
        written = self.model.write([ids for *_, ids, _ in job.prompts], [most for *_, most in job.prompts], until)
        texts = []
        for ids in written:
            text = self.model.decode(ids)
            texts.append(text[: min([text.find(stop) for stop in until if stop in text], default=len(text))])
        return lambda: [texts, [len(ids) for ids in written]]


@dataclass(frozen=True)
class WritingJob:
    """Prompts that are continued together: (until, number of ids, index, ids, how many tokens to write at most)."""

    prompts: list[tuple]

    @property
    def n_tokens(self):
        return sum(n for _, n, *_ in self.prompts)

    @property
    def sha256(self):
        return hashlib.sha256(json.dumps(self.prompts).encode()).hexdigest()


def windows(ids, first, seq_len):
    """Cut ids into (inputs, targets) of at most seq_len inputs; the targets, each id from `first` on once, end them.

    These are lm-eval's rolling windows: the next begins with the token before its first target, and the last is filled
    up on the left with what has been scored already. Windows, and not one pass through the recurrent state, because
    attention has never been trained on a position beyond seq_len.
    """
    for start in range(first, len(ids), seq_len):
        end = min(start + seq_len, len(ids))
        yield ids[max(0, end - seq_len - 1) : end - 1], ids[start:end]


def owners(jobs, n_ranks):
    """The rank of each job: stretches of about equal cost, so that neighbours, which share a trunk, stay together."""
    cost = np.array([job.n_tokens for job in jobs], float)
    middle = (cost.cumsum() - cost / 2) / max(cost.sum(), 1)
    return np.minimum((middle * n_ranks).astype(int), n_ranks - 1).tolist()


# ---- the tree


def build_tree(pieces, starts, share):
    """The nodes from which all of the pieces (inputs, targets) begin; the scores of piece i go to starts[i] and on.

    A shared stretch is a node of its own where reading it once pays (worth_it), and else is read with each of the
    texts behind it; so are all of them unless share. A text that others go on from is scored within one of them.
    """
    order = sorted(range(len(pieces)), key=lambda i: pieces[i][0])
    texts = [pieces[i][0] for i in order]
    for i in reversed(range(len(texts) - 1)):
        if texts[i + 1][: len(texts[i])] == texts[i]:
            texts[i] = texts[i + 1]

    def node(lo, hi, start, end):
        scored = []
        for i in order[lo:hi]:
            inputs, targets = pieces[i]
            first = len(inputs) - len(targets)
            places = range(max(first, start), min(len(inputs), end))
            scored += [(place - start, targets[place - first], starts[i] + place - first) for place in places]
        return Node(texts[lo][start:end], scored)

    def nodes(lo, hi, start):
        """Of texts[lo:hi], which agree on the first `start` tokens, from there on."""
        end = shared_length(texts[lo], texts[hi - 1], start)
        if end == len(texts[lo]):  # none is the beginning of another, so all of them are this text
            return [node(lo, hi, start, end)]
        here, at = node(lo, hi, start, end), lo
        while at < hi:
            stop = at + 1
            while stop < hi and texts[stop][end] == texts[at][end]:
                stop += 1
            here.children += nodes(at, stop, end)
            at = stop
        return [here] if share and worth_it(here) else put_before(here, here.children)

    return nodes(0, len(texts), 0) if texts else []


def worth_it(node):
    """Whether reading the node's tokens once, and not with each child, saves enough."""
    saved = len(node.tokens) * (len(node.children) - 1)
    return saved >= max(MIN_SAVED_TOKENS, MIN_SAVED * (node.n_tokens + saved))


def put_before(node, children):
    """The children, each with the node's tokens in front; one of them, no matter which, has its scores."""
    n = len(node.tokens)
    for child in children:
        child.tokens = node.tokens + child.tokens
        child.scored = [(place + n, target, slot) for place, target, slot in child.scored]
    children[0].scored = node.scored + children[0].scored
    return children


def shared_length(a, b, least):
    """How many tokens a and b begin with alike, knowing that it is at least `least`."""
    most = min(len(a), len(b))
    if a[least:most] == b[least:most]:
        return most
    while least < most - 1:  # they agree on `least`, and not on `most`
        middle = (least + most) // 2
        if a[least:middle] == b[least:middle]:
            least = middle
        else:
            most = middle
    return least


def cut_into_jobs(nodes, batch_size, into_batches, trunk=()):
    """Yield the jobs that read all of nodes, once each. into_batches: see `batches`, of which it is one.

    A node with more texts below than a batch has rows becomes trunk: it is read alone, by every process that needs it.
    """
    small = []
    for node in nodes:
        if node.n_texts <= batch_size or not node.children:
            small.append(node)
            continue
        if node.scored:
            small.append(Node(node.tokens, node.scored))
        yield from cut_into_jobs(node.children, batch_size, into_batches, (*trunk, node))
    for batch in into_batches(small):
        yield Job(trunk, batch)


def batches(nodes, batch_size, max_positions, max_scored, ragged):
    """Yield the nodes in batches, the longest first, with padding on the right, where a causal model does not see it.

    Nodes that others go on from stand apart, and only equally long ones together unless the model is ragged, since
    padding would enter what it keeps of them.
    """

    def longest_first(part):
        return sorted(part, key=lambda node: -len(node.tokens))

    inner, leaves = longest_first(n for n in nodes if n.children), longest_first(n for n in nodes if not n.children)
    alike = [inner] if ragged else [list(same) for _, same in groupby(inner, key=lambda node: len(node.tokens))]
    for group in [*alike, leaves]:
        batch, n_scored, padding = [], 0, 0
        for node in group:
            length = len((batch or [node])[0].tokens)
            full = len(batch) == batch_size or (len(batch) + 1) * length > max_positions or padding > MAX_PADDING
            if batch and (full or n_scored + len(node.scored) > max_scored):
                yield batch
                batch, n_scored, padding, length = [], 0, 0, len(node.tokens)
            batch.append(node)
            n_scored += len(node.scored)
            padding += length - len(node.tokens)
        if batch:
            yield batch


def rows_that_fit(config, n_bytes, itemsize):
    """8 to 512 texts of a forward pass; states of PREFIX_TOKENS, of itemsize a number, fill at most n_bytes."""
    scan = 4 * config.n_mamba_heads * config.d_state * config.mamba_head_dim
    cache = 2 * itemsize * config.n_kv_heads * config.head_dim * PREFIX_TOKENS
    rows = n_bytes // (config.layer_pattern.count("M") * scan + config.layer_pattern.count("A") * cache)
    return min(512, 1 << max(rows, 8).bit_length() - 1)


def padded(rows, filler, device):
    """Rows of ids as one tensor (b, l) there, and their lengths (b,), None if they are all the same."""
    lengths = [len(row) for row in rows]
    length = max(lengths)
    tokens = to_device([row + [filler] * (length - len(row)) for row in rows], device)
    return tokens, None if min(lengths) == length else to_device(lengths, device)


def to_device(numbers, device):
    """Whole numbers as a tensor there; nothing waits until a GPU has them, nor for what it is at."""
    tensor = torch.as_tensor(np.asarray(numbers, np.int64))
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def from_device(tensor):
    """A function that gives the tensor as an array. The copy begins now, before what a GPU is given next."""
    if tensor.device.type == "cpu":
        return tensor.numpy
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensor.device))

    def wait():
        copied.synchronize()
        return host.numpy()

    return wait
