"""A small engine whose checkpoints are saved as DeepSpeed's are, and processes that save together, without DeepSpeed.

Weights and moments of a step are random numbers of that step's seed, so that whatever is read back can be told.
"""

import multiprocessing
import os
import queue
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch._dynamo  # a first optimizer would import it, in seconds, in each fork
import torch.distributed as dist

SHAPES = {"wide": (7, 11), "long": (3000,), "one": (1,)}
KINDS = ("weight", "exp_avg", "exp_avg_sq")


def values(step):
    """{"<kind>/<parameter>": tensor} of a step"""
    generator = torch.Generator().manual_seed(step)
    return {f"{kind}/{name}": torch.randn(s, generator=generator) for kind in KINDS for name, s in SHAPES.items()}


def toy_engine():
    """What train.checkpoint needs of an engine, in ZeRO stage 0."""
    module = torch.nn.Module()
    for name, shape in SHAPES.items():
        module.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    return SimpleNamespace(module=module, optimizer=optimizer, zero_optimization_stage=lambda: 0, device="cpu")


def training_engine():
    """One that can be trained: 33,000 parameters, the same at each call."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    return SimpleNamespace(module=module, optimizer=optimizer, zero_optimization_stage=lambda: 0, device="cpu")


def fill(engine, step):
    """Give the engine the weights and moments of a step."""
    of_step = values(step)
    with torch.no_grad():
        for name, parameter in engine.module.named_parameters():
            parameter.copy_(of_step[f"weight/{name}"])
            engine.optimizer.state[parameter] = {kind: of_step[f"{kind}/{name}"] for kind in KINDS[1:]}


def differing(checkpoint):
    """The tensors of a checkpoint that are not those of its step."""
    of_step = values(checkpoint.step)
    found = {f"{kind}/{name}": checkpoint.tensor(name, kind) for kind in KINDS for name in SHAPES}
    return [key for key, value in of_step.items() if not torch.equal(found[key], value)]


def begin(save, engine, run_dir, step):
    fill(engine, step)
    tokenizer = run_dir.path / "tokenizer"
    save.begin(engine, run_dir.checkpoint(step), step=step, tokens=step, run={"skipped_steps": 2}, tokenizer=tokenizer)


def join_group(rank, world_size, store, timeout_s=30):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", rank=rank, world_size=world_size, store=dist.FileStore(str(store), world_size),
        timeout=timedelta(seconds=timeout_s),
    )  # fmt: skip


def run_ranks(world_size, function, folder, *arguments, timeout_s=30):
    """Run function(rank, *arguments) in processes of one group. Returns what each returned or raised, None if killed.

    They are forks, so that a test may replace what it likes beforehand.
    """
    context = multiprocessing.get_context("fork")
    answers = context.Queue()

    def work(rank):
        join_group(rank, world_size, folder / f"store{os.getppid()}", timeout_s)
        try:
            answers.put((rank, function(rank, *arguments)))
        except Exception as error:
            answers.put((rank, error))

    processes = [context.Process(target=work, args=(rank,)) for rank in range(world_size)]
    for process in processes:
        process.start()
    found = [None] * world_size
    while any(process.is_alive() for process in processes) or not answers.empty():
        try:
            rank, answer = answers.get(timeout=0.1)
            found[rank] = answer
        except queue.Empty:
            continue
        if all(answer is not None for answer in found):
            break
    for process in processes:
        process.join(30)
    (folder / f"store{os.getpid()}").unlink(missing_ok=True)
    return found
