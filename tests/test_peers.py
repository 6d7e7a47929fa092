"""Models of other families, with tokenizers of their own, through the same command: lm-eval's own answers."""

import json

import pytest
import torch
from lm_eval.evaluator import evaluate
from small_benchmarks import make_benchmarks
from small_run import make_text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

from eval import harness, scoreboard
from eval.task_data import load_tasks

TASKS = ["piqa", "lambada", "arc_easy", "truthfulqa_mc1", "mmlu"]
SHAPE = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2}
ATTENTION = {**SHAPE, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 640}
FAMILIES = {  # how to make the model, and whether its tokenizer begins every text with a token of its own
    "gpt2": (
        lambda: GPT2LMHeadModel(GPT2Config(vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=640)),
        False,
    ),
    "pythia": (lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**ATTENTION)), False),
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**ATTENTION, num_key_value_heads=2)), True),
    "mamba": (lambda: MambaForCausalLM(MambaConfig(**SHAPE, state_size=8)), False),
}


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return make_benchmarks(tmp_path_factory.mktemp("questions"), 2)


def write_model(folder, family):
    """A folder as transformers writes it, of a model with random weights far from uniform, and a trained tokenizer."""
    make, begins = FAMILIES[family]
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(8)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<s>", "</s>"] if begins else ["<|endoftext|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([make_text(i, 50) for i in range(20)], trainer)
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=special[0], eos_token=special[-1])
    whole.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_the_command_gives_a_peer_what_lm_evals_own_model_does(family, questions, tmp_path):
    pytest.importorskip("accelerate", reason="lm-eval's Hugging Face model needs it")
    from lm_eval.models.huggingface import HFLM

    folder = write_model(tmp_path / family, family)
    flags = [folder, "--data", questions, "--out", tmp_path / "scores", "--tasks", *TASKS, "--device", "cpu"]
    assert harness.main([str(flag) for flag in flags]) == 0
    results = json.loads((tmp_path / "scores/results.json").read_text())
    assert results["model"]["kind"] == "transformers"
    assert results["model"]["reads_shared_once"] == (family != "mamba")  # whose cache cannot take several tokens
    lm = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=8)
    for name in TASKS:
        # two of MMLU's 57 subjects take lm-eval's model long enough
        tasks = {task.config.task: task for _, task in load_tasks(name, questions)[:2]}
        theirs = evaluate(lm, tasks, bootstrap_iters=0, log_samples=True)["samples"]
        lines = (tmp_path / "scores" / "samples" / f"{name}.jsonl").read_text().splitlines()
        ours = [json.loads(line) for line in lines][: 2 * len(tasks)]
        rows = [row for task in tasks for row in sorted(theirs[task], key=lambda row: row["doc_id"])]
        for sample, row in zip(ours, rows, strict=True):
            assert sample["context"] == row["arguments"][0][0]
            assert sample["loglikelihoods"] == pytest.approx([float(n) for n, _ in row["filtered_resps"]], rel=1e-5)
            assert sample["metrics"]["acc"] == row["acc"]


def test_a_peer_has_a_scoreboard_of_its_own(questions, tmp_path, capsys):
    folder = write_model(tmp_path / "peer", "pythia")
    flags = [folder, "--benchmarks", questions, "--tasks", "piqa", "arc_easy", "--out", tmp_path / "peer.json"]
    assert scoreboard.main([str(flag) for flag in flags]) == 0
    rows = json.loads((tmp_path / "peer.json").read_text())["benchmarks"]["rows"]
    assert [(row["task"], row["n"]) for row in rows] == [("piqa", 2), ("arc_easy", 2)]
    assert "PIQA" in capsys.readouterr().out
