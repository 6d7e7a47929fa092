"""Let a checkpoint write:

    python -m eval.sample runs/demo/checkpoints/step_0000400 --prompt "def main(" --temperature 0.7

Prints each text with its speed and writes runs/demo/eval/sample_0000400.json.
"""

import argparse
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from curation.tokenizer import load_tokenizer
from eval.command import check_out, run_command
from eval.scoreboard import DEVICE, eval_folder
from model.decode import Decoder
from model.generate import generate
from model.weights import check_device, load_checkpoint
from train.run_dir import write_json

PROMPTS = ("", "def main(", "The function returns ")


def write_sample(model, tokenizer, prompt, **settings):
    """What the model writes after the prompt, token by token, up to the separator or settings["max_tokens"].

    settings: the keyword arguments of model.generate.generate. The prompt stands at the start of a document.
    """
    started = time.perf_counter()
    prompt_ids = [tokenizer.separator_id, *tokenizer.encode(prompt)]
    limits = {"stop_ids": (tokenizer.separator_id,), "vocab_size": tokenizer.vocab_size}
    ids = list(generate(model, prompt_ids, **limits, **settings))
    seconds = time.perf_counter() - started
    return {
        "prompt": prompt,
        "text": tokenizer.decode(ids),
        "tokens": len(ids),
        "ended": len(ids) < settings["max_tokens"],  # the model wrote the separator
        "seconds": round(seconds, 3),
        "tokens_per_s": round(len(ids) / seconds, 1),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m eval.sample", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", help="a checkpoint folder: runs/<run>/checkpoints/step_...")
    parser.add_argument("--prompt", action="append", help="text to go on from; may be repeated (default: three)")
    parser.add_argument("--max-tokens", type=int, default=200, help="tokens of a text, at most (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (default %(default)s)")
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="from the likeliest of this mass (default %(default)s)"
    )
    parser.add_argument("--top-k", type=int, default=0, help="from so many likeliest; 0 = all (default %(default)s)")
    parser.add_argument(
        "--min-p", type=float, default=0.0, help="from what has this part of the likeliest (default %(default)s)"
    )
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1: seen tokens less often (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text (default %(default)s)")
    parser.add_argument("--out", type=Path, help="JSON file; default: runs/<run>/eval/sample_<step>.json")
    parser.add_argument("--device", default=DEVICE, help="torch device (default here: %(default)s)")
    flags = parser.parse_args(argv)
    try:
        if flags.max_tokens < 1:
            raise ValueError(f"--max-tokens {flags.max_tokens}: at least 1")
        check_device(flags.device)
        checkpoint = load_checkpoint(flags.checkpoint)
        out = flags.out or eval_folder(checkpoint) / f"sample_{checkpoint.step:07d}.json"
        check_out(out)
        model, tokenizer = checkpoint.load_model(flags.device), load_tokenizer(checkpoint.tokenizer_path)
        names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed")
        settings = {name: getattr(flags, name) for name in names}
        samples, decoder = [], Decoder(model)
        for prompt in flags.prompt or PROMPTS:
            samples.append(write_sample(model, tokenizer, prompt, decoder=decoder, **settings))
            print(f"---- {samples[-1]['tokens']} tokens, {samples[-1]['tokens_per_s']:.0f} tokens/s")
            print(prompt + samples[-1]["text"])
        write_json(
            out,
            {
                "checkpoint": {"path": str(checkpoint.path), "step": checkpoint.step, "sha256": checkpoint.sha256},
                "settings": settings,
                "samples": samples,
                "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
            },
        )
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    run_command(main)
