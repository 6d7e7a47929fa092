"""The public benchmarks during training: a few questions of each, the same every time, asked of the live engine.

The questions are made once, by eval/questions.py in a process of its own on rank 0, and are scored as those of a
checkpoint are: by the same code (model/scorer.py, model/choices.py), with the same float32 head.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from curation.shards import new_file
from model.choices import choose, mean_scores
from model.scorer import BATCH_SIZE, MAX_POSITIONS, NotFinite, Scorer, padded, rows_that_fit, to_device
from train.checkpoint import owned_pieces
from train.trackers import LAUNCHER_VARIABLES, ROOT

STATES = 1 << 32  # bytes that the rows of a forward pass on a GPU may keep
ITEMS = 100  # questions of each benchmark
MOST = 0.02  # of the time of a run that measuring may take
LEAST_S = 1.0  # less is nothing to speak of


def make_questions(config, plan, tokenizer_file):
    """What eval/questions.py writes. Rank 0. Raises ValueError with its one line if there is nothing to ask."""
    command = [sys.executable, "-m", "eval.questions", "--data", os.path.abspath(config.eval_data)]
    if config.eval_data == "hub":
        command = command[:-2]
    command += ["--tokenizer", str(Path(tokenizer_file).resolve()), "--seq-len", str(plan.model.seq_len)]
    command += ["--items", str(config.eval_items or ITEMS)]
    command += ["--tasks", *config.eval_tasks.split(",")] if config.eval_tasks else []
    environment = {key: value for key, value in os.environ.items() if key not in LAUNCHER_VARIABLES}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "questions.json"
        done = subprocess.run(
            [*command, "--out", str(out)], cwd=ROOT, env=environment | {"CUDA_VISIBLE_DEVICES": ""},
            capture_output=True, text=True, errors="replace",
        )  # fmt: skip
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            raise ValueError(f"--eval-data {config.eval_data}: {said[-1].removeprefix('error: ')}")
        return json.loads(out.read_bytes())


class Quiz:
    """The questions, and how they are asked of an engine."""

    def __init__(self, questions, plan):
        """questions: as make_questions gives them on rank 0, which tells the others. All ranks."""
        told = [questions]
        dist.broadcast_object_list(told, src=0)
        [self.questions], self.plan = told, plan

    def write(self, path):
        with new_file(path) as file:
            file.write(json.dumps(self.questions, separators=(",", ":")).encode())

    @property
    def about(self):
        tasks = self.questions["tasks"]
        n = sum(len(task["items"]) for task in tasks.values())
        return f"with each measurement, {n:,} questions of {len(tasks)} benchmarks are asked: {', '.join(tasks)}"

    def ask(self, engine, note=lambda: None):
        """{"eval": {benchmark: {"n", "acc" ...}}} for the row of a step. All ranks.

        A model whose log-probabilities are not numbers gives {"eval": {}}. note: called before each pass, for the
        watchdog. Weights, optimizer and random state stay as they are: nothing is drawn, and no gradient is taken.
        """
        model = LiveModel(engine, self.plan, self.questions["prefix_id"], note)
        positions = min(MAX_POSITIONS, self.plan.micro_batch * self.plan.model.seq_len)  # a step keeps more of as many
        scorer = Scorer(model, max_positions=positions, quiet=True)
        tasks, pieces = self.questions["tasks"], []
        for task in tasks.values():
            for item in task["items"]:
                pieces += [(ids[:-1], ids[len(ids) - n :]) for ids, n in (*item["texts"], *item["alone"])]
        engine.eval()
        try:
            answers = iter(scorer.score(pieces))
        except NotFinite:
            return {"eval": {}}
        finally:
            engine.train()
        return {"eval": {name: score_task(task, answers) for name, task in tasks.items()}}


def score_task(task, answers):
    """{"n", the mean of each of the task's metrics}; answers: an iterator of (nats, greedy), this task's next."""
    rows = []
    for item in task["items"]:
        given = [next(answers) for _ in item["texts"]]
        nats, alone = [nats for nats, _ in given], [next(answers)[0] for _ in item["alone"]]
        if item["choices"] is None:
            metrics = {"acc": int(given[0][1])}
        else:
            metrics = choose(nats, alone, item["choices"], item["gold"])[1]
        rows.append(({key: value for key, value in metrics.items() if key in ("tie", *task["metrics"])}, nats))
    scores = mean_scores(rows)
    return {key: value for key, value in scores.items() if key != "tie"}


class LiveModel:
    """The network of a DeepSpeed engine as a Scorer asks it (eval/models.py says what that is). All ranks make it.

    In ZeRO-3 a forward pass gathers the weights from all ranks, so it takes all of them: before each, they tell one
    another whether they have something to read, and who has nothing reads a token for the others' sake.
    """

    shares, ragged, max_scored = True, True, sys.maxsize

    def __init__(self, engine, plan, prefix_id, note):
        self.engine, self.prefix_id, self.note = engine, prefix_id, note
        self.seq_len, self.vocab_size = plan.model.seq_len, plan.model.vocab_size
        self.together = engine.zero_optimization_stage() == 3 and dist.get_world_size() > 1
        self.head = master_of(engine, "embedding.weight" if plan.model.tied_embeddings else "head.weight")
        self.batch_size = rows_that_fit(plan.model, STATES, 2) if self.head.is_cuda else BATCH_SIZE

    def read(self, rows, state, places, keep):
        if self.together:
            self.anyone_reads(True)
        tokens, lengths = padded(rows, self.prefix_id, self.head.device)
        if state is not None or keep:
            state = self.engine.module.going_on(state, lengths if keep else None)
        hidden = self.forward(tokens, state).flatten(0, 1)
        return hidden[to_device(places, hidden.device)], state if keep else None

    def forward(self, tokens, state):
        self.note()
        return self.engine(tokens, state=state, head=False)

    def logits(self, hidden):
        return F.linear(hidden.float(), self.head)

    def take(self, state, rows):
        return self.engine.module.take_rows(state, to_device(rows, self.head.device))

    @torch.no_grad()
    def wait_for_others(self):
        while self.together and self.anyone_reads(False):
            self.forward(to_device([[self.prefix_id]], self.head.device), None)

    def anyone_reads(self, mine):
        readers = torch.tensor(float(mine), device=self.head.device)
        dist.all_reduce(readers)
        return bool(readers.item())


@torch.no_grad()
def master_of(engine, name):
    """A parameter in float32, as the optimizer has it and a checkpoint would hold it. All ranks call it."""
    parameter = dict(engine.module.named_parameters())[name]
    shape = getattr(parameter, "ds_shape", parameter.shape)  # in ZeRO-3 it is empty itself
    whole = torch.zeros(shape.numel(), device=engine.device)
    for piece in owned_pieces(engine):
        if piece.name == name:
            whole[piece.start : piece.start + piece.numel] = piece.weight()
    if engine.zero_optimization_stage():
        dist.all_reduce(whole)  # each element is one rank's
    return whole.view(shape)


class Cost:
    """What measuring takes of a run's time."""

    def __init__(self):
        self.ended, self.n, self.told = time.perf_counter(), 0, False

    def line(self, began, step_count):
        """Of a measurement that began then, after so many steps, and ends now: one line if it was too long, else None.

        The first is left out, as kernels may have been compiled for it, and so are those that nobody would notice. The
        line comes once.
        """
        ended, before = time.perf_counter(), self.ended
        self.ended, self.n = ended, self.n + 1
        taken, share = ended - began, (ended - began) / (ended - before)
        if self.n < 2 or self.told or share <= MOST or taken < LEAST_S:
            return None
        self.told = True
        every = math.ceil(taken * (1 / MOST - 1) * step_count / (began - before))
        return f"measuring took {taken:.1f} s, {share:.1%} of the time; --eval-every {every} would make it {MOST:.0%}"
