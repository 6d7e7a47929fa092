"""How lm-eval sees our models and our data: one LM class over a HybridLM, and task objects over a data folder's files.

Nothing here knows a network or a cache: the documents come from the data folder, and the task definitions from
tasks.json, which is handed to lm-eval as it stands.
"""

import json
import sys
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from model.generate import generate

TASKS = json.loads((Path(__file__).parent / "tasks.json").read_text(encoding="utf-8"))


class HarnessLM(TemplateLM):
    """A HybridLM as an lm-eval model. Every text starts with the separator, as every document does in training.

    batch_tokens: input positions of one forward pass, padding included (one sequence may exceed it).
    n_truncated counts the prompts that lost their beginning because they were longer than the model's seq_len.
    The same requests get the same answers whatever the batch: the padding stands on the right, where a causal model
    does not see it. Raises ValueError on a log-probability that is not finite, since an argmax over NaN is choice 0.
    """

    def __init__(self, model, tokenizer, *, batch_tokens):
        super().__init__()
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens
        self.seq_len = model.config.seq_len
        self.n_truncated = 0
        self._device = next(model.parameters()).device

    @property
    def eot_token_id(self):
        return self.tokenizer.separator_id

    def tok_encode(self, string, add_special_tokens=None, **_):
        ids = self.tokenizer.encode(string)
        return ids if add_special_tokens is False else [self.tokenizer.separator_id, *ids]

    def loglikelihood(self, requests, disable_tqdm=True):
        """[(nats, greedy)] of each request's continuation after its context; lm-eval's rule splits the two."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(self, requests, **_):
        if empty := [continuation for (_, continuation), _, target_ids in requests if not target_ids]:
            raise ValueError(f"the continuation {empty[0]!r} adds no token to its context, so it cannot be scored")
        self.n_truncated += sum(len(context) + len(target) > self.seq_len + 1 for _, context, target in requests)
        return self._score([(context + target, len(context)) for _, context, target in requests], "choices and words")

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        """[nats] of each request's whole text: every token once, the first one predicted from the separator."""
        texts = [(self.tok_encode(request.args[0]), 1) for request in requests]
        return [nats for nats, _ in self._score(texts, "held-out text")]

    def generate_until(self, requests, disable_tqdm=False):
        """[text] that the model writes after each context, up to one of the `until` strings or max_gen_toks tokens."""
        texts = []
        for request in tqdm(requests, desc="writing", disable=disable_tqdm):
            context, options = request.args
            until = [options["until"]] if isinstance(options.get("until"), str) else options.get("until", [])
            temperature = options.get("temperature", 0.0) if options.get("do_sample") else 0.0
            ids, text = [], ""
            for token in generate(
                self.model,
                self.tok_encode(context),
                max_tokens=options.get("max_gen_toks", 256),
                temperature=temperature,
                stop_ids=(self.eot_token_id,),
                vocab_size=self.tokenizer.vocab_size,
            ):
                ids.append(token)
                text = self.tokenizer.decode(ids)
                if any(stop in text for stop in until):
                    break
            texts.append(text[: min([text.find(stop) for stop in until if stop in text], default=len(text))])
        return texts

    @torch.inference_mode()
    def _score(self, requests, what):
        """[(nats, greedy)] of the ids from `first` on, for each (ids, first).

        greedy: at every one of them no other token is as likely. Sums are float64 over float32 log-probabilities.
        """
        nats, greedy = [0.0] * len(requests), [True] * len(requests)
        pieces = [(i, *window) for i, request in enumerate(requests) for window in windows(*request, self.seq_len)]
        pieces.sort(key=lambda piece: -len(piece[1]))
        n_tokens = sum(len(inputs) for _, inputs, _ in pieces)
        every = 0.1 if sys.stderr.isatty() else 10  # seconds; a log file gets a line now and then
        with tqdm(total=n_tokens, desc=f"scoring {what}", unit="tok", unit_scale=True, mininterval=every) as bar:
            start = 0
            while start < len(pieces):
                batch = pieces[start : start + max(1, self.batch_tokens // len(pieces[start][1]))]
                start += len(batch)
                for (i, inputs, _), (row_nats, row_greedy) in zip(batch, self._score_batch(batch), strict=True):
                    nats[i] += row_nats
                    greedy[i] &= row_greedy
                    bar.update(len(inputs))
        return list(zip(nats, greedy, strict=True))

    def _score_batch(self, batch):
        """[(nats, greedy)] of each (_, inputs, targets): one forward pass, the head on the scored positions alone."""
        tokens, scored, targets = self._collate(batch)
        hidden = self.model.hidden(tokens)[scored]  # (targets of the batch, d)
        # in float32 whatever the model's dtype: bfloat16 logits tie, or flip, close choices
        logits = F.linear(hidden.float(), self.model.head_weight.float())
        log_probs = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        if not log_probs.isfinite().all():
            raise ValueError(
                "the model gives a log-probability that is not finite, so no score of it means anything; "
                "its weights have diverged or are damaged: take an earlier checkpoint"
            )
        greedy = (logits >= logits.gather(-1, targets[:, None])).sum(-1) == 1
        lengths = [len(targets) for _, _, targets in batch]
        rows = zip(log_probs.double().split(lengths), greedy.split(lengths), strict=True)
        return [(row_nats.sum().item(), row_greedy.all().item()) for row_nats, row_greedy in rows]

    def _collate(self, batch):
        """tokens (b, l), padded on the right; scored (b, l), true where a target belongs; targets in reading order."""
        length = max(len(inputs) for _, inputs, _ in batch)
        tokens = torch.full((len(batch), length), self.eot_token_id)
        scored = torch.zeros_like(tokens, dtype=torch.bool)
        for row, (_, inputs, targets) in enumerate(batch):
            tokens[row, : len(inputs)] = torch.tensor(inputs)
            scored[row, len(inputs) - len(targets) : len(inputs)] = True
        targets = torch.tensor([token for _, _, targets in batch for token in targets])
        return tokens.to(self.device), scored.to(self.device), targets.to(self.device)


def windows(ids, first, seq_len):
    """Cut ids into (inputs, targets) of at most seq_len inputs; the targets, each id from `first` on once, end them.

    These are lm-eval's rolling windows: the next begins with the token before its first target, and the last is filled
    up on the left with what has been scored already. Windows, and not one pass through the recurrent state, because
    attention has never been trained on a position beyond seq_len.
    """
    for start in range(first, len(ids), seq_len):
        end = min(start + seq_len, len(ids))
        yield ids[max(0, end - seq_len - 1) : end - 1], ids[start:end]


def score_choices(doc, results):
    """lm-eval's acc and acc_norm (nats divided by characters) of one multiple-choice item, with ties at chance.

    Choices that share the best score share the credit: right with k best is 1/k, so a model that cannot tell them
    apart scores chance. lm-eval takes the first of them, which is 100 % where the first is always right.
    tie: 1.0 when the best score was shared, under either rule.
    """
    nats = np.array([score for score, _ in results])
    acc, tied = _credit(nats, doc["answer"])
    acc_norm, tied_norm = _credit(nats / [len(choice) for choice in doc["choices"]], doc["answer"])
    return {"acc": acc, "acc_norm": acc_norm, "tie": float(tied or tied_norm)}


def _credit(scores, answer):
    # 1e-6: float32 sums move by this much with the shape of the batch, so closer scores are not told apart
    best = scores >= scores.max() - 1e-6 * np.abs(scores).max()
    return float(best[answer] / best.sum()), best.sum() > 1


def build_tasks(documents):
    """What lm_eval's evaluate takes, from {(task, source): documents}; source None: the task has one set of items.

    The task's definition is its entry in tasks.json. Names are lm-eval's: "heldout_prose", "continuation".
    """
    return TaskManager(include_defaults=False).load([_task_config(*key, docs) for key, docs in documents.items()])


def task_name(task, source):
    return f"{task}_{source}" if source else task


def _task_config(task, source, documents):
    config = {
        **TASKS[task]["config"],
        "task": task_name(task, source),
        "num_fewshot": 0,
        "test_split": "test",
        "custom_dataset": partial(_dataset, documents),
    }
    if config["output_type"] == "multiple_choice":
        config["process_results"] = score_choices
    return config


def _dataset(documents, **_):
    return {"test": datasets.Dataset.from_list(documents)}  # in memory: no cache folder, no guessed column types
