"""Deduplication against datatrove's MinHash steps: fingerprints, pairs, clusters, planted duplicates, an added file.

Both use 5-grams, 14 bands of 8 hashes. The peer splits words with spaCy and writes numbers as 0, so the two do not
hash the same 5-grams: what is compared is speed, memory, and what is found of what was planted.
"""

import json
import os
import random
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from curation.contests.measure import Contest, Measured, measure
from curation.dedup import (
    Clusters,
    band_pairs,
    fingerprint,
    mixed,
    rank,
    similarities,
    sketch,
    survivors,
    without_licence,
)

BANDS, ROWS, NGRAM = 14, 8, 5
MIN_SIMILARITY = 0.65  # estimated, of two documents that share a key
REPETITIONS = 3
EVERY = 60  # of the corpus's documents one is fingerprinted: about 3 MB
N_PAIRS = 500_000
N_KEYS = 200_000
SIMILARITIES = (0.5, 0.7, 0.8, 0.9, 1.0)  # Jaccard, of 5-grams, of what is planted
PLANTED = 100  # of each similarity
WORDS = 300  # of each document there


def contests(corpus: Path) -> list[Contest]:
    """corpus: folder of <kind>/*.jsonl.zst with a column "text"."""
    return [
        fingerprints(corpus),
        pairs_of_keys(),
        *clusters_of_pairs(),
        planted_duplicates(corpus),
        licensed_files(corpus),
        added_file(corpus),
    ]


def sample(corpus: Path, every: int) -> list[str]:
    """The text of one document in `every`, of all kinds."""
    texts = []
    for path in sorted(corpus.glob("*/*.jsonl.zst")):
        with zstandard.open(path, "rt", encoding="utf-8") as lines:
            texts += [json.loads(line)["text"] for i, line in enumerate(lines) if i % every == 0]
    return texts


def peer_name(step: str) -> str:
    return f"datatrove {version('datatrove')} {step}"


def signature_step(folder: str) -> Any:
    """The peer's stage 1 with its defaults; its xxhash of strings is given bytes, for xxhash 4 takes nothing else."""
    import xxhash
    from datatrove.pipeline.dedup import MinhashDedupSignature

    step = MinhashDedupSignature(folder)
    step._hash_func = lambda gram: xxhash.xxh64_intdigest(gram.encode())
    return step


def repeated(ours: Callable[[], Measured], theirs: Callable[[], Measured]) -> tuple[list[Measured], list[Measured]]:
    """Both in turn, REPETITIONS times, by CPU time."""
    runs = [(ours(), theirs()) for _ in range(REPETITIONS)]
    mine, other = zip(*runs, strict=True)
    return sorted(mine, key=lambda m: m.cpu_s), sorted(other, key=lambda m: m.cpu_s)


def median_and_spread(work: float, runs: Sequence[Measured]) -> tuple[float, str]:
    rates = [work / run.cpu_s for run in runs]
    digits = 0 if min(rates) > 100 else 2
    return rates[len(rates) // 2], f"{min(rates):,.{digits}f} to {max(rates):,.{digits}f}"


# ---- stage 1


def fingerprints(corpus: Path) -> Contest:
    ours, theirs = repeated(
        lambda: measure(our_fingerprints, prepare=partial(our_texts, corpus, EVERY)),
        lambda: measure(their_signatures, prepare=partial(their_step, corpus, EVERY)),
    )
    megabytes = sum(len(text.encode()) for text in sample(corpus, EVERY)) / 1e6
    mine, my_spread = median_and_spread(megabytes, ours)
    other, other_spread = median_and_spread(megabytes, theirs)
    return Contest(
        step="fingerprint: text digest, 14 MinHash keys, sketch",
        metric="MB of text per CPU second",
        peer=peer_name("MinhashDedupSignature"),
        ours=mine,
        theirs=other,
        target="at least 10 times",
        reached=mine >= 10 * other,
        note=f"ours {my_spread}, theirs {other_spread}; peak {ours[-1].peak_rss_mb:.0f} and "
        f"{theirs[-1].peak_rss_mb:.0f} MB",
    )


def our_texts(corpus: Path, every: int) -> list[str]:
    fingerprint("tables are made on first use", NGRAM, BANDS, ROWS)
    return sample(corpus, every)


def our_fingerprints(texts: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        digests, keys, sketches = zip(
            *((*fingerprint(text, NGRAM, BANDS, ROWS), sketch(text, NGRAM, BANDS, ROWS)) for text in texts),
            strict=True,
        )
        np.savez(
            Path(folder) / "prints.npz", digests=np.array(digests), keys=np.array(keys), sketches=np.array(sketches)
        )


def their_step(corpus: Path, every: int) -> tuple[Any, list[str], str]:
    from datatrove.utils.logging import logger

    logger.remove()
    folder = tempfile.mkdtemp()
    step = signature_step(folder)
    step.get_shingles("spaCy is loaded on first use")
    return step, sample(corpus, every), folder


def their_signatures(prepared: tuple[Any, list[str], str]) -> None:
    from datatrove.data import Document

    step, texts, folder = prepared
    try:
        step.run(Document(text=text, id=str(i)) for i, text in enumerate(texts))
    finally:
        shutil.rmtree(folder)


# ---- stage 2


def pairs_of_keys() -> Contest:
    keys = np.random.default_rng(0).integers(0, 2 * N_KEYS, N_KEYS).astype(np.uint64)
    with tempfile.TemporaryDirectory() as folder:
        signatures = Path(folder) / "signatures" / "bucket_000"
        signatures.mkdir(parents=True)
        record = np.zeros(N_KEYS, np.dtype([("hashes", "<u8", ROWS), ("document", "<u4")]))
        record["hashes"] = mixed(keys)[:, None] >> np.uint64(3)  # the peer reads below 2^61 - 1
        record["document"] = np.arange(N_KEYS)
        record[np.argsort(record["hashes"][:, 0], kind="stable")].tofile(signatures / "00000.minhash.sig")
        keys_file = Path(folder) / "keys.npy"
        np.save(keys_file, mixed(keys))
        ours, theirs = repeated(
            lambda: measure(our_pairs, keys_file), lambda: measure(their_pairs, folder, prepare=quiet)
        )
    mine, my_spread = median_and_spread(N_KEYS, ours)
    other, other_spread = median_and_spread(N_KEYS, theirs)
    same = ours[0].result == theirs[0].result
    return Contest(
        step="pairs of equal keys in one band",
        metric="documents per CPU second",
        peer=peer_name("MinhashDedupBuckets"),
        ours=mine,
        theirs=other,
        target="at least 10 times, as many pairs",
        reached=same and mine >= 10 * other,
        note=f"ours {my_spread}, theirs {other_spread}; {ours[0].result:,} and {theirs[0].result:,} pairs",
    )


def our_pairs(keys_file: Path) -> int:
    return len(band_pairs(np.load(keys_file, mmap_mode="r")))


def quiet() -> None:
    """Import the peer outside the measured time, and let it say nothing."""
    os.environ["TQDM_DISABLE"] = "1"  # read when tqdm is imported
    import datatrove.pipeline.dedup  # noqa: F401
    from datatrove.utils.logging import logger

    logger.remove()


def their_pairs(_: None, folder: str) -> int:
    from datatrove.pipeline.dedup import MinhashDedupBuckets

    MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/pairs").run(rank=0, world_size=BANDS)
    return (Path(folder) / "pairs" / "00000_00.dups").stat().st_size // 16


# ---- stage 3


def clusters_of_pairs() -> list[Contest]:
    with tempfile.TemporaryDirectory() as folder:
        n = 2 * N_PAIRS
        draw = np.random.default_rng(0)
        for band in range(BANDS):
            documents = draw.integers(0, n, N_PAIRS // BANDS).astype(np.uint32)
            partners = documents ^ draw.integers(1, 8, len(documents)).astype(np.uint32)  # one of its group of 8
            pairs = np.stack([documents, np.minimum(partners, n - 1)], axis=1)
            np.save(Path(folder) / f"{band:02d}.npy", pairs)
            records = np.zeros((len(pairs), 4), "<u4")  # (file, document) twice
            records[:, [1, 3]] = pairs
            records.tofile(Path(folder) / f"{band:05d}_00.dups")
        ours, theirs = repeated(
            lambda: measure(our_clusters, Path(folder), n),
            lambda: measure(their_clusters, Path(folder), prepare=quiet),
        )
    mine, my_spread = median_and_spread(N_PAIRS, ours)
    other, other_spread = median_and_spread(N_PAIRS, theirs)
    removed, grown = ([run.result[i] for run in (ours[0], theirs[0])] for i in (0, 1))
    my_bytes, their_bytes = (grown_bytes / N_PAIRS for grown_bytes in grown)
    counts = f"{removed[0]:,} and {removed[1]:,} of {n:,} documents removed"
    shared = dict(step="clusters of duplicate pairs", peer=peer_name("MinhashDedupCluster"))
    return [
        Contest(
            **shared,
            metric="pairs per CPU second",
            ours=mine,
            theirs=other,
            target="at least 10 times, as many removed",
            reached=removed[0] == removed[1] and mine >= 10 * other,
            note=f"ours {my_spread}, theirs {other_spread}; {N_PAIRS:,} pairs; {counts}",
        ),
        Contest(
            **shared,
            metric="peak bytes a pair",
            ours=my_bytes,
            theirs=their_bytes,
            target="at most 24",
            reached=my_bytes <= 24,
            note=f"of {N_PAIRS:,} pairs, memory maps and the array of all {n:,} documents included",
        ),
    ]


def our_clusters(folder: Path, n: int) -> tuple[int, int]:
    """Documents removed, and by how much memory grew meanwhile at its peak, bytes."""
    before = memory_now()
    clusters = Clusters(n)
    for path in sorted(folder.glob("*.npy")):
        clusters.join(np.load(path, mmap_mode="r"))
    lowest = clusters.lowest()
    grown = memory_peak() - before
    return int((lowest != np.arange(n)).sum()), grown


def their_clusters(_: None, folder: Path) -> tuple[int, int]:
    from datatrove.pipeline.dedup import MinhashDedupCluster

    with tempfile.TemporaryDirectory() as out:
        before = memory_now()
        MinhashDedupCluster(str(folder), out).run()
        grown = memory_peak() - before
        return sum(path.stat().st_size for path in Path(out).glob("*.remove")) // 4, grown


def memory_now() -> int:
    """Bytes in use; the peak counts from here on. Linux."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def memory_peak() -> int:
    return status("VmHWM")


def status(field: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


# ---- what was planted


def planted_duplicates(corpus: Path) -> Contest:
    texts, similarities = plant(corpus)
    n = len(similarities)  # text n + i is the copy of text i
    ours, theirs = our_labels(texts), measure(their_labels, texts, prepare=quiet).result
    theory = 1 - (1 - similarities**ROWS) ** BANDS
    levels = np.arange(n) % len(SIMILARITIES)
    found = [labels[n:] == labels[:n] for labels in (ours, theirs)]
    wrong = [n - len(np.unique(labels[:n])) for labels in (ours, theirs)]
    by_level = [
        f"{level} " + "/".join(f"{share[levels == i].mean():.0%}" for share in (*found, theory))
        for i, level in enumerate(SIMILARITIES)
    ]
    high = similarities >= 0.78
    mine, other, expected = (float(share[high].mean()) for share in (*found, theory))
    return Contest(
        step="planted copies of Jaccard similarity 0.8 and more",
        metric="share found",
        peer=peer_name("MinHash stages 1 to 3"),
        ours=mine,
        theirs=other,
        target="theory less 3 %, none joined wrongly",
        reached=mine >= expected - 0.03 and wrong[0] == 0,
        note=f"theory of the keys alone {expected:.1%}; by similarity (ours/theirs/theory): {', '.join(by_level)}; "
        f"of {n} different texts joined: {wrong[0]} and {wrong[1]}",
    )


def plant(corpus: Path) -> tuple[list[str], np.ndarray]:
    """Texts that have little in common, then an edited copy of each; the similarity of each pair."""
    draw = random.Random(0)
    originals = unlike(corpus, PLANTED * len(SIMILARITIES))
    copies, similarities = [], []
    for i, words in enumerate(originals):
        level = SIMILARITIES[i % len(SIMILARITIES)]
        edits = draw.sample(range(WORDS), round((WORDS - 4) * (1 - level) / (1 + level) / 5))  # 5 grams an edit
        copy = ["edited" if j in edits else word for j, word in enumerate(words)]
        a, b = five_grams(words), five_grams(copy)
        copies.append(copy)
        similarities.append(len(a & b) / len(a | b))
    return [" ".join(words) for words in originals + copies], np.array(similarities)


def unlike(corpus: Path, n: int) -> list[list[str]]:
    """The first WORDS words of n texts of the corpus of which none has a tenth of its 5-grams from others."""
    chosen: list[list[str]] = []
    seen: set[tuple[str, ...]] = set()
    for text in sample(corpus, 10):
        words = re.findall(r"[a-z]+", text.lower())[:WORDS]
        grams = five_grams(words)
        if len(words) == WORDS and len(grams & seen) < len(grams) / 10 and len(chosen) < n:
            seen |= grams
            chosen.append(words)
    if len(chosen) < n:
        raise ValueError(f"{corpus}: {len(chosen)} texts of {WORDS} words that are unlike, {n} are needed")
    return chosen


def five_grams(words: list[str]) -> set[tuple[str, ...]]:
    return set(zip(*(words[i:] for i in range(NGRAM)), strict=False))


def our_labels(texts: list[str]) -> np.ndarray:
    """The same number for texts of one cluster."""
    digests, keys = (np.array(part) for part in zip(*(fingerprint(t, NGRAM, BANDS, ROWS) for t in texts), strict=True))
    sketches = np.array([sketch(text, NGRAM, BANDS, ROWS) for text in texts])
    return survivors(
        digests,
        keys.T,
        np.arange(len(texts), dtype=np.uint64),
        is_near=lambda a, b: similarities(sketches[a], sketches[b], BANDS * ROWS) >= MIN_SIMILARITY,
    )[1].astype(int)


def their_labels(_: None, texts: list[str]) -> np.ndarray:
    from datatrove.data import Document

    with tempfile.TemporaryDirectory() as folder:
        their_stages(folder, [(Document(text=text, id=str(i)) for i, text in enumerate(texts))])
        documents, clusters = np.fromfile(f"{folder}/remove/000000.clusters", "<u4").reshape(-1, 2).T
    labels = -1 - np.arange(len(texts))
    labels[documents] = clusters
    return labels


def their_stages(folder: str, parts: Sequence[Iterable[Any]]) -> None:
    """The peer's stages 1 to 3 over documents that come in parts, one a task; leaves <folder>/remove."""
    from datatrove.pipeline.dedup import MinhashDedupBuckets, MinhashDedupCluster

    for task, part in enumerate(parts):
        signature_step(f"{folder}/signatures").run(part, task, len(parts))
    for band in range(BANDS):
        MinhashDedupBuckets(f"{folder}/signatures", f"{folder}/pairs").run(rank=band, world_size=BANDS)
    MinhashDedupCluster(f"{folder}/pairs", f"{folder}/remove", save_cluster_id=True).run()


# ---- files under one licence


def licensed_files(corpus: Path) -> Contest:
    """Different files that begin with the same long licence: a comment there is most of a short file's 5-grams."""
    with zstandard.open(corpus / "code" / "java_design_patterns.jsonl.zst", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    ours, theirs = our_labels(texts), measure(their_labels, texts, prepare=quiet).result
    grams = [five_grams(re.findall(r"\w+", without_licence(text).lower())) for text in texts]

    def wrong(labels: np.ndarray) -> int:
        """Documents removed, less than half of whose 5-grams any other document of the cluster has."""
        clusters: dict[int, list[int]] = {}
        for i, label in enumerate(labels.tolist()):
            clusters.setdefault(label, []).append(i)
        unlike = 0
        for members in clusters.values():
            times = Counter(gram for i in members for gram in grams[i])
            unlike += sum(sum(times[g] > 1 for g in grams[i]) < len(grams[i]) / 2 for i in members[1:])
        return unlike

    mine, other = wrong(ours), wrong(theirs)
    removed = [len(texts) - len(np.unique(labels)) for labels in (ours, theirs)]
    return Contest(
        step="source files under one licence",
        metric="files removed that are unlike all others but for the licence",
        peer=peer_name("MinHash stages 1 to 3"),
        ours=mine,
        theirs=other,
        target="0",
        reached=mine == 0,
        note=f"removed at all: {removed[0]} and {removed[1]} of {len(texts)} files",
    )


# ---- a file is added


def added_file(corpus: Path) -> Contest:
    """Files b and c are fingerprinted, a file a is added, then what is duplicate is dropped from all three."""
    texts = [" ".join(words) for words in unlike(corpus, 130)]
    b, new = texts[:100], texts[100:]
    copies = b[:10]
    files = {"b": b, "c": new[:20] + copies}
    more = {"a": new[20:], **files}
    duplicates = {f"c/{i}" for i in range(20, 30)}

    before, after = our_removals(files), our_removals(more)
    assert before == after, "a file without duplicates changed what is removed"
    theirs = measure(their_removals, files, more, prepare=quiet).result
    mine = len(after ^ duplicates)
    return Contest(
        step="a file is added between fingerprints and removal",
        metric="documents removed or kept wrongly",
        peer=peer_name("MinHash stages 1 to 4"),
        ours=mine,
        theirs=len(theirs ^ duplicates),
        target="0",
        reached=mine == 0,
        note=f"theirs: {len(duplicates - theirs)} duplicates kept, {len(theirs - duplicates)} others removed",
    )


def our_removals(files: dict[str, list[str]]) -> set[str]:
    """What is removed of "<file>/<number>"; from b rather than from c, as if it came from the better source."""
    ids = [f"{name}/{i}" for name, texts in files.items() for i in range(len(texts))]
    prints = [fingerprint(text, NGRAM, BANDS, ROWS) for texts in files.values() for text in texts]
    digests, keys = (np.array(part) for part in zip(*prints, strict=True))
    priorities = np.array(["bca".index(i[0]) for i in ids])
    id_hashes = np.array([fingerprint(i, NGRAM, BANDS, ROWS)[0][0] for i in ids])
    stays = survivors(digests, keys.T, rank(priorities, id_hashes))[1]
    return {ids[i] for i in range(len(ids)) if stays[i] != i}


def their_removals(_: None, files: dict[str, list[str]], more: dict[str, list[str]]) -> set[str]:
    from datatrove.data import Document
    from datatrove.pipeline.dedup import MinhashDedupFilter

    def parts(files: dict[str, list[str]]) -> list[list[Document]]:  # a task a file, in the order of their names
        return [
            [Document(text=text, id=f"{name}/{i}") for i, text in enumerate(files[name])] for name in sorted(files)
        ]

    with tempfile.TemporaryDirectory() as folder:
        their_stages(folder, parts(files))
        step = MinhashDedupFilter(f"{folder}/remove")
        tasks = enumerate(parts(more))
        kept = {document.id for task, part in tasks for document in step.run(iter(part), task, len(more))}
    return {f"{name}/{i}" for name, texts in more.items() for i in range(len(texts))} - kept
