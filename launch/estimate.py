"""What a run needs, before anything is spent. Needs no torch.

python launch/estimate.py --size 6.7B --json
"""

import argparse
import json
import sys
from pathlib import Path

if __spec__ is None:  # run by path: import from the repo root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from model.config import get_preset


def estimate(size, *, layer_pattern=None, seq_len=None):
    """The counts of one named size, as a dict. Raises ValueError for an unknown name or an impossible shape."""
    model = get_preset(size, layer_pattern=layer_pattern, seq_len=seq_len)
    return {
        "size": size,
        "layer_pattern": model.layer_pattern,
        "seq_len": model.seq_len,
        "parameters": model.n_parameters,
        "parameters_by_part": model.parameters_by_part,
        "flops_per_token": model.flops_per_token,
        "flops_per_token_by_part": model.flops_per_token_by_part,
    }


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", required=True, help="a name in model.config.PRESETS: nano, 1.3B, 6.7B ...")
    parser.add_argument("--layer-pattern", help="one letter a layer, M or A, such as AMAMAMAM (default: the size's)")
    parser.add_argument("--seq-len", type=int, help="tokens in a sequence (default: the size's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    flags = parser.parse_args(argv)
    try:
        result = estimate(flags.size, layer_pattern=flags.layer_pattern, seq_len=flags.seq_len)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if flags.json:
        print(json.dumps(result, indent=2))
        return 0
    print(f"{flags.size}: {result['layer_pattern']}, sequences of {result['seq_len']:,} tokens")
    for title, total, parts in (
        ("parameters", result["parameters"], result["parameters_by_part"]),
        ("FLOPs a token, forward and backward", result["flops_per_token"], result["flops_per_token_by_part"]),
    ):
        print(f"{title}: {total:,}")
        for part, count in parts.items():
            print(f"  {part:<22}{count:>18,}  {count / total:6.1%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
