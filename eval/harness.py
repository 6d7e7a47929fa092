"""Running tasks: the public benchmarks on any model, and a data folder's own tasks through lm-eval.

    python -m eval.harness runs/demo/checkpoints/step_0001600 --data data/evals --out runs/demo/eval/step_0001600
    torchrun --nproc_per_node 8 -m eval.harness EleutherAI/pythia-1.4b --out scores/pythia-1.4b

writes samples/<task>.jsonl, a line an item, and results.json. Several processes, on one machine or many, share the
work and give the scores of one. Killed, it goes on where it was when it is started again.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path
from unittest.mock import patch

import datasets
import lm_eval.utils
import torch
import torch.distributed as dist
from lm_eval.api.model import TemplateLM
from lm_eval.tasks import TaskManager

from curation.shards import new_file
from eval.answers import AnswerFile, answers_folder
from eval.command import check_out, run_command
from eval.models import DTYPES, OwnModel, load_model
from eval.task_data import BENCHMARKS, check_names, check_pins, load_prompts, load_tasks
from model.choices import choose, mean_scores
from model.scorer import Scorer, windows
from model.weights import check_device
from train.run_dir import write_json

SEED = 1234  # of shots that are drawn: lm-eval's own
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
        self.model, self.tokenizer = model, tokenizer
        self.scorer = Scorer(OwnModel(model, tokenizer), batch_size=batch_tokens, max_positions=batch_tokens)
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

    def generate_until(self, requests, **_):
        """[text] that the model writes after each context, the likeliest token each time: see the scorer."""
        return self.scorer.generate_until([request.args for request in requests])

    def _score(self, requests, what):
        """[(nats, greedy)] of the ids from `first` on, for each (ids, first), read in windows."""
        texts = [list(windows(*request, self.seq_len)) for request in requests]
        return self.scorer.score_texts(texts, f"scoring {what}")


def score_choices(doc, results):
    """lm-eval's acc and acc_norm (nats divided by characters) of one multiple-choice item, with ties at chance."""
    return choose([nats for nats, _ in results], [], doc["choices"], doc["answer"])[1]


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


# ---- the public benchmarks


@dataclass(kw_only=True)
class Item:
    """One question as it is asked. requests: (context, continuation), one a choice; or (prompt, options), one."""

    group: str | None
    doc_id: int
    doc: dict
    shots: int
    dropped_shots: int
    requests: list
    choices: list[str] | None
    gold: int | str
    unconditional: list = field(default_factory=list)
    lm_evals: list = field(default_factory=list)  # its requests, which have all shots even if their beginning is lost


def run_tasks(model_spec, tasks, *, data=None, device, limit=None, batch_size=None, out, dtype=None, size=None):
    """Score a model on benchmarks, write out/samples/<task>.jsonl, and return what results.json holds. All ranks.

    model_spec: a checkpoint folder, a Hugging Face folder or a name (or what eval.models.load_model gave); tasks:
    names of benchmarks.json, None: all; data: a folder of their files, None: the Hub; limit: only the first so many
    items of each task (of each subject of MMLU, as lm-eval's). dtype, size: see load_model. Scores do not depend on
    batch_size. Raises FileNotFoundError or ValueError, in one line, for what is missing or wrong, before the model is
    loaded where it can be seen then.
    """
    started, names, out = time.monotonic(), check_names(tasks), Path(out)
    if any(number is not None and number < 1 for number in (batch_size, limit)):
        raise ValueError(f"batch size {batch_size}, limit {limit}: both must be at least 1")
    rank = dist.get_rank() if dist.is_initialized() else 0
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about settings that we mean
    datasets.disable_progress_bars()
    pins = None if data is None else check_pins(data, names)
    loaded = isinstance(model_spec, str | Path)
    model = load_model(model_spec, device=device, dtype=dtype, size=size) if loaded else model_spec
    folder = answers_folder(out, model, device, rank)
    batch_size = batch_size or model.batch_size
    totals, results = {"forward_tokens": 0, "forward_tokens_hf": 0}, {}
    for name in names:
        begun, answers = time.monotonic(), AnswerFile(folder, name, rank)
        scorer = Scorer(model, batch_size=batch_size, answers=answers)
        try:
            samples = run_task(name, scorer, data, limit)
        finally:
            answers.close()
        if rank == 0:
            with new_file(out / "samples" / f"{name}.jsonl") as file:
                file.writelines((json.dumps(sample, ensure_ascii=False) + "\n").encode() for sample in samples)
        results[name] = {
            **summary(samples),
            "dropped_shots": sum(sample["dropped_shots"] > 0 for sample in samples),
            "n_truncated": scorer.n_truncated,
            "forward_tokens": scorer.forward_tokens,
            "forward_tokens_hf": scorer.forward_tokens_hf,
            "seconds": round(time.monotonic() - begun, 1),
        }
        totals = {key: n + results[name][key] for key, n in totals.items()}
    return {
        "tasks": results,
        "model": {
            "name": model.name, "kind": model.kind, "sha256": model.sha256, "parameters": model.n_parameters,
            "seq_len": model.seq_len, "dtype": model.dtype, "reads_shared_once": model.shares,
        },
        "data": {"path": None if data is None else str(data), "sha256": pins},
        "settings": {"limit": limit, "batch_size": batch_size, "device": str(device)},
        **totals,
        "seconds": round(time.monotonic() - started, 1),
    }  # fmt: skip


def run_task(name, scorer, data, limit):
    """The samples of one benchmark, one an item, in lm-eval's order."""
    if BENCHMARKS[name].get("written"):
        items = written_items(name, data, limit)
        texts = scorer.generate_until([item.requests[0] for item in items])
        return [sample_of(name, item, [], [], text) for item, text in zip(items, texts, strict=True)]
    items = ask_items(name, scorer, load_tasks(name, data), limit)
    asked = [request for item in items for request in item.requests]
    beside = [request for item in items for request in item.unconditional]
    theirs = [request for item in items for request in item.lm_evals]
    answers = iter(scorer.loglikelihoods(asked + beside, name, theirs))
    given = [[next(answers) for _ in item.requests] for item in items]
    alone = [[next(answers) for _ in item.unconditional] for item in items]
    return [sample_of(name, *parts) for parts in zip(items, given, alone, strict=True)]


def ask_items(*arguments, **options):
    """[Item]: asked_items, with each of lm-eval's templates compiled once, not each time that it is filled in.

    That would be 80 % of the time before the model runs.
    """
    with patch.object(lm_eval.utils.env, "from_string", lru_cache(lm_eval.utils.env.from_string)):
        return list(asked_items(*arguments, **options))


def asked_items(name, scorer, tasks, limit=None, chosen=None):
    """Yield a benchmark's items, asked as lm-eval asks them, with fewer shots where the prompt would not fit.

    tasks: load_tasks's; chosen: {(subject or None, doc_id)} of the items that are wanted, None: all.
    """
    context = BENCHMARKS[name].get("unconditional")
    for group, task in tasks:
        task.set_fewshot_seed(SEED)
        shots = task.config.num_fewshot
        for doc_id, doc in task.doc_iterator(limit=limit):
            if chosen is not None and (group, doc_id) not in chosen:
                continue
            tried = []
            for n_shots in range(shots, -1, -1):
                prompt = task.fewshot_context(doc, num_fewshot=n_shots)
                instances = task.construct_requests(doc=doc, ctx=prompt, metadata=(name, doc_id, 1))
                instances = instances if isinstance(instances, list) else [instances]
                tried.append([instance.args for instance in instances])
                if all(scorer.fits(*request) for request in tried[-1]):
                    break
            requests = tried[-1]
            several = task.OUTPUT_TYPE == "multiple_choice"
            choices = list(task.doc_to_choice(doc)) if several else None
            gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
            yield Item(
                group=group, doc_id=doc_id, doc=doc, shots=n_shots, dropped_shots=shots - n_shots,
                requests=requests, choices=choices, lm_evals=tried[0],
                gold=choices.index(gold) if several and isinstance(gold, str) else gold,
                unconditional=[(context, continuation) for _, continuation in requests] if context else [],
            )  # fmt: skip


def written_items(name, data, limit):
    definition, rows = load_prompts(name, data)
    return [
        Item(
            group=None, doc_id=doc_id, doc=doc, shots=0, dropped_shots=0, choices=None,
            requests=[(lm_eval.utils.apply_template(definition["doc_to_text"], doc), definition["generation_kwargs"])],
            gold=lm_eval.utils.apply_template(definition["doc_to_target"], doc),
        )
        for doc_id, doc in enumerate(rows[:limit])
    ]  # fmt: skip


def sample_of(name, item, answers, alone, text=None):
    """The line of samples/<task>.jsonl about one item; eval/README.md says what its keys are."""
    nats, chosen, metrics = [answer.nats for answer in answers], None, {}
    if item.choices is not None:
        chosen, metrics = choose(nats, [answer.nats for answer in alone], item.choices, item.gold)
        if "acc_norm" not in BENCHMARKS[name]["metrics"]:
            del metrics["acc_norm"]
    elif answers:
        metrics = {"acc": int(answers[0].greedy)}
    texts = item.choices or [continuation for _, continuation in item.requests if answers]
    return {
        "task": name,
        "doc_id": item.doc_id,
        "item_sha256": hashlib.sha256(json.dumps(item.doc, sort_keys=True).encode()).hexdigest(),
        "group": item.group,
        "shots": item.shots,
        "dropped_shots": item.dropped_shots,
        "choices": item.choices,
        "loglikelihoods": nats,
        "unconditional": [answer.nats for answer in alone] or None,
        "bytes": [len(part.encode()) for part in texts],
        "tokens": [answer.n_tokens for answer in answers],
        "gold": item.gold,
        "prediction": chosen,
        "greedy": answers[0].greedy if answers and item.choices is None else None,
        "generation": text,
        "metrics": metrics,
        "context": item.requests[0][0],
    }


def summary(samples):
    """mean_scores of the samples, and "groups": the same of each subject."""
    values = mean_scores([(sample["metrics"], sample["loglikelihoods"]) for sample in samples])
    groups = sorted({sample["group"] for sample in samples if sample["group"]})
    if groups:
        values["groups"] = {
            group: summary([{**sample, "group": None} for sample in samples if sample["group"] == group])
            for group in groups
        }
    return values


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m eval.harness", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", help="a checkpoint folder, a Hugging Face folder, or a name on the Hub")
    parser.add_argument("--tasks", nargs="+", help=f"of {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--data", help="folder of the tasks' files (make eval-data); default: the Hub")
    parser.add_argument("--out", type=Path, required=True, help="folder for samples, results and kept answers")
    parser.add_argument("--limit", type=int, help="only the first so many items of each task")
    parser.add_argument("--batch-size", type=int, help="texts a forward pass (default: as suits the model)")
    parser.add_argument("--device", help="torch device (default: this process's GPU, else cpu)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--size", help="refuse a model that is not of this size, such as 1.3B")
    flags = parser.parse_args(argv)
    rank = join_processes()
    device = flags.device or (f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    try:
        check_device(device)
        check_out(flags.out / "results.json")
        results = run_tasks(
            flags.model, flags.tasks, data=flags.data, device=device, limit=flags.limit, batch_size=flags.batch_size,
            out=flags.out, dtype=flags.dtype, size=flags.size,
        )  # fmt: skip
    except (FileNotFoundError, ValueError) as error:
        if rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if rank == 0:
        write_json(flags.out / "results.json", results)
        for name, row in results["tasks"].items():
            scores = "  ".join(f"{key} {row[key]:.4f}" for key in ("acc", "acc_norm", "acc_uncond") if key in row)
            print(f"{name:15} {row['n']:6,} items  {row['seconds']:7.1f} s  {scores}")
        share = results["forward_tokens"] / max(results["forward_tokens_hf"], 1)
        print(f"{results['forward_tokens']:,} tokens read, {share:.1%} of what lm-eval's hf model reads")
        print(f"written to {flags.out}")
    return 0


def join_processes():
    """Join the other processes where a launcher (torchrun, deepspeed) started this one; the rank, 0 when alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        # only results are exchanged, which lie in host memory; a rank may wait long for one with a longer share
        dist.init_process_group("gloo", timeout=timedelta(hours=12))
    return dist.get_rank() if dist.is_initialized() else 0


if __name__ == "__main__":
    run_command(main, "run the same command to go on")
