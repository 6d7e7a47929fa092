"""How fast the data arrives: start-up at 100 billion tokens, and tokens a second beside other projects' loaders.

    python -m train.bench_data

The start-up is shown on a data folder of that size whose shards are sparse files: headers, and no blocks on disk. Each
measurement is a new process. The speed is taken warm and on one core, on a shard set that is really there (made here,
or that of a folder given with --data): batches of 8 sequences of 2,048 tokens in random order, as int64 tensors of
tokens and targets. Ours also says which document each token belongs to, and so does datatrove in one of its rows. The
loaders take turns, and each keeps its best turn. Peers: datatrove's folder of .ds files, Hugging Face datasets'
memory-mapped Arrow and a memory map drawn from as nanoGPT does, for which requirements.txt is enough; and litdata,
which is left out where it is not installed.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from curation.shards import SHARD, ShardHeader, open_stream, shard_prefix, write_manifest, write_source
from train.mixture import check_epochs, mixture_starts, read_mixture

SEQ_LEN = 2048
BATCH = 8
SEPARATOR_ID = 0
HEADER = ShardHeader(
    source="", split="train", vocab_size=1 << 16, separator_id=SEPARATOR_ID, tokenizer_sha256="0" * 64
)
SOURCES = {"books": 0.1, "code": 0.2, "math": 0.1, "qa": 0.05, "science": 0.1, "web": 0.35, "wiki": 0.1}
DOCUMENT_TOKENS = 1000  # on average


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m train.bench_data",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--tokens", type=float, default=100e9, help="of the sparse folder (default: 100e9)")
    parser.add_argument("--shard-tokens", type=float, default=100e6, help="in one of its shards (default: 100e6)")
    parser.add_argument("--data", type=Path, help="a data folder for the speed (default: 32M random tokens)")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a loader's turn (default: 1)")
    parser.add_argument("--turns", type=int, default=5, help="turns of each loader (default: 5)")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench_data_") as folder:
        try:
            show_start_up(Path(folder), int(arguments.tokens), int(arguments.shard_tokens))
            show_speed(Path(folder), arguments.data, arguments.seconds, arguments.turns)
        except (ValueError, FileNotFoundError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


def print_table(title, headings, rows):
    """A table that Markdown shows as one; the first column holds text, the others numbers."""
    table = Table(box=box.MARKDOWN)
    for heading in headings:
        table.add_column(heading, justify="left" if heading == headings[0] else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(width=max(119, Console().width))
    console.print(title)
    console.print(table)


# ---- start-up at full size


def show_start_up(folder, n_tokens, shard_tokens):
    n_shards = make_sparse_folder(folder / "sparse", n_tokens, shard_tokens)
    rows = []
    mixture = ",".join(f"{source}={weight}" for source, weight in SOURCES.items())
    for text in (None, mixture):
        for share in (0.0, 0.5):
            found = start_up_alone(folder / "sparse", text, int(share * n_tokens) // SEQ_LEN)
            name = f"{len(SOURCES)} sources" if text else "none"
            rows.append((
                name, f"{share:.0%}", f"{found['open_s']:.3f}", f"{found['batch_ms']:.2f}",
                f"{found['peak_mib']:.0f}", f"{found['imports_mib']:.0f}",
            ))  # fmt: skip
    print_table(
        f"start-up: {n_tokens:,} tokens in {n_shards:,} shards, sparse files",
        ("mixture", "first batch at", "open s", "first batch ms", "peak MiB", "of which imports MiB"),
        rows,
    )


def make_sparse_folder(folder, n_tokens, shard_tokens):
    """A data folder of zeros that takes no room on disk but the headers; returns its number of token shards."""
    (folder / "train").mkdir(parents=True)
    files, sources, n_shards = {}, {}, 0
    for source, weight in SOURCES.items():
        entry = {"documents": 0, "tokens": 0, "text_bytes": 4 * int(weight * n_tokens), "shards": []}
        left = int(weight * n_tokens)
        while left:
            tokens = min(left, shard_tokens)
            documents = -(-tokens // DOCUMENT_TOKENS)
            name = f"train/{source}-{len(entry['shards']):05d}{SHARD}"
            prefix = shard_prefix(
                replace(HEADER, source=source), {"ids": (documents, 2), "starts": (documents,)}, tokens
            )
            with open(folder / name, "wb") as file:
                file.write(prefix)
                file.truncate(len(prefix) + 24 * documents + 2 * tokens)
            files[name] = {"bytes": (folder / name).stat().st_size, "sha256": "0" * 64}
            entry["shards"].append(name)
            entry["tokens"] += tokens
            entry["documents"] += documents
            left -= tokens
        sources[source] = entry
        n_shards += len(entry["shards"])
    finish(folder, sources, files)
    return n_shards


def finish(folder, sources, files):
    tokenizer = {"file": "tokenizer.model", "sha256": HEADER.tokenizer_sha256, "vocab_size": HEADER.vocab_size}
    tokenizer["separator_id"] = HEADER.separator_id
    write_manifest(folder, {"tokenizer": tokenizer, "splits": {"train": {"sources": sources}}}, files)


def start_up_alone(*arguments):
    """start_up in a process of its own, which has read nothing yet and has not imported torch."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(start_up, arguments)


def start_up(folder, mixture_text, position):
    """Open the stream and read the batch at a position (a sequence number); seconds and the process's peak memory."""
    from train.order import shuffled

    imports_mib = peak_mib()
    began = time.perf_counter()
    mixture = read_mixture(mixture_text)
    stream = open_stream(folder, "train", mixture and mixture.sources)
    if mixture:
        check_epochs(mixture, stream, SEQ_LEN, 0, position + BATCH)
    opened = time.perf_counter()
    places = np.arange(position, position + BATCH)
    if mixture:
        starts = mixture_starts(places, mixture, stream, SEQ_LEN, 0)
    else:
        starts = SEQ_LEN * shuffled(places, (stream.n_tokens - 1) // SEQ_LEN, 0)
    stream.read_rows(starts, SEQ_LEN + 1)
    batch_ms = 1e3 * (time.perf_counter() - opened)
    return {"open_s": opened - began, "batch_ms": batch_ms, "peak_mib": peak_mib(), "imports_mib": imports_mib}


def peak_mib():
    """The most memory that this process has held, in MiB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


# ---- speed beside other loaders


def show_speed(folder, data, seconds, turns):
    import torch

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    data = data or make_random_folder(folder / "random", 32_000_000)
    stream = open_stream(data, "train")
    all_tokens = np.concatenate(stream.shards)  # what the peers' own formats are made of
    loaders = {
        "this repository": our_batches(stream, None),
        f"this repository, mixture of {len(stream.sources)}": our_batches(
            stream, ",".join(f"{source}=1" for source in stream.sources)
        ),
        "memory map, as nanoGPT": nanogpt_batches(folder, all_tokens),
        "datatrove DatatroveFolderDataset": datatrove_batches(folder, all_tokens, return_positions=False),
        "datatrove, with positions in the document": datatrove_batches(folder, all_tokens, return_positions=True),
        "Hugging Face datasets": hf_batches(folder, all_tokens),
    }
    if find_spec("litdata"):
        loaders["litdata TokensLoader"] = litdata_batches(folder, all_tokens)
    best = dict.fromkeys(loaders, 0.0)
    for turn in range(turns + 1):
        for name, batches in loaders.items():
            rate = tokens_per_s(batches, seconds)
            if turn:  # the first turn warms up
                best[name] = max(best[name], rate)
    title = f"one core, warm: {stream.n_tokens:,} tokens, batches of {BATCH} x {SEQ_LEN}, best of {turns}"
    print_table(title, ("loader", "M tokens/s"), [(name, f"{rate / 1e6:.0f}") for name, rate in best.items()])


def tokens_per_s(batches, seconds):
    began = time.perf_counter()
    n = 0
    while (now := time.perf_counter()) - began < seconds:
        tokens, targets = next(batches)
        assert tokens.shape == targets.shape == (BATCH, SEQ_LEN)
        assert tokens.dtype == targets.dtype
        n += tokens.numel()
    return n / (now - began)


def make_random_folder(folder, n_tokens):
    """A data folder of random tokens in documents of random length: two sources of four shards."""
    random = np.random.default_rng(0)
    sources = {}
    for source in ("one", "two"):
        tokens = random.integers(1, 50_000, n_tokens // 2, dtype=np.uint16)
        edges = np.flatnonzero(random.random(len(tokens)) < 1 / DOCUMENT_TOKENS)
        documents = ((f"{source}/{i}", piece) for i, piece in enumerate(np.split(tokens, edges)))
        sources[source] = write_source(
            folder, replace(HEADER, source=source), documents, 2 * n_tokens, shard_tokens=n_tokens // 8
        )
    finish(folder, sources, None)
    return folder


def our_batches(stream, mixture_text):
    """The loop's own generator, at 8 micro-batches a step."""
    from train.data import training_batches

    plan = SimpleNamespace(
        model=SimpleNamespace(seq_len=SEQ_LEN), batch_sequences=8 * BATCH, micro_batch=BATCH, grad_accum=8
    )
    for batch in training_batches(stream, plan, 0, 0, 1, 1, "cpu", read_mixture(mixture_text)):
        yield batch.tokens, batch.targets


def raw_file(folder, tokens):
    """The tokens as bare uint16, as nanoGPT and datatrove keep them."""
    path = folder / "raw" / "tokens.ds"
    if not path.exists():
        path.parent.mkdir()
        tokens.tofile(path)
    return path


def nanogpt_batches(folder, tokens):
    """get_batch of nanoGPT's train.py: a random place for each row, with replacement."""
    import torch

    path = raw_file(folder, tokens)
    while True:
        data = np.memmap(path, dtype=np.uint16, mode="r")  # anew for each batch, as there, against a leak
        places = torch.randint(len(data) - SEQ_LEN, (BATCH,))
        x = torch.stack([torch.from_numpy(data[i : i + SEQ_LEN].astype(np.int64)) for i in places])
        y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + SEQ_LEN].astype(np.int64)) for i in places])
        yield x, y


def from_dataset(dataset, key):
    """A torch DataLoader over a map-style data set of rows of SEQ_LEN + 1 tokens, without end."""
    from torch.utils.data import DataLoader

    while True:
        for batch in DataLoader(dataset, batch_size=BATCH, shuffle=True, drop_last=True):
            rows = batch[key].long()
            yield rows[:, :-1], rows[:, 1:]


def datatrove_batches(folder, tokens, return_positions):
    from datatrove.utils.dataset import DatatroveFolderDataset

    dataset = DatatroveFolderDataset(
        str(raw_file(folder, tokens).parent), SEQ_LEN, return_positions=return_positions,
        positions_from_eos_token_id=SEPARATOR_ID if return_positions else None,
    )  # fmt: skip
    return from_dataset(dataset, "input_ids")


def dataset_rows(tokens):
    return tokens[: len(tokens) // (SEQ_LEN + 1) * (SEQ_LEN + 1)].reshape(-1, SEQ_LEN + 1)


def hf_batches(folder, tokens):
    """Arrow on disk, memory-mapped, rows by a list of indices: the fastest way that it has."""
    import torch
    from datasets import Dataset, Features, Sequence, Value

    features = Features({"input_ids": Sequence(Value("uint16"), length=SEQ_LEN + 1)})
    saved = folder / "arrow"
    Dataset.from_dict({"input_ids": dataset_rows(tokens)}, features=features).save_to_disk(saved)
    dataset = Dataset.load_from_disk(str(saved)).with_format("numpy")
    while True:
        order = torch.randperm(len(dataset)).tolist()
        for first in range(0, len(order) - BATCH + 1, BATCH):
            rows = dataset[order[first : first + BATCH]]["input_ids"]
            rows = torch.from_numpy(np.asarray(rows, dtype=np.int64))
            yield rows[:, :-1], rows[:, 1:]


def litdata_batches(folder, tokens):
    from litdata import StreamingDataLoader, StreamingDataset, TokensLoader, optimize

    out = str(folder / "litdata")
    path = str(raw_file(folder, tokens))
    optimize(
        fn=litdata_pieces, inputs=[path], output_dir=out, num_workers=1, item_loader=TokensLoader(),
        chunk_size=4000 * (SEQ_LEN + 1),
    )  # fmt: skip
    dataset = StreamingDataset(out, item_loader=TokensLoader(block_size=SEQ_LEN + 1), shuffle=True, drop_last=True)
    return litdata_rows(StreamingDataLoader(dataset, batch_size=BATCH, drop_last=True))


def litdata_pieces(path):
    import torch

    tokens = np.fromfile(path, dtype=np.uint16)
    for first in range(0, len(tokens), 1 << 20):
        yield torch.from_numpy(tokens[first : first + (1 << 20)])


def litdata_rows(loader):
    while True:
        for rows in loader:
            if len(rows) == BATCH:
                yield rows[:, :-1].long(), rows[:, 1:].long()


if __name__ == "__main__":
    sys.exit(main())
