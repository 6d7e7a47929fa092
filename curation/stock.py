"""datatrove's own steps inside our tasks: `--stock dedup` and `--stock tokenizer` (`--stock filters`: filters.py).

Pieces, ledger, keys, held-out split, shards and manifest stay as they are, so two runs differ by these steps alone.
What the steps write for each other lies in the folder of the task and is gone before that appears.
"""

import json
import os
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from datatrove.data import Document

from curation.dedup import survivors
from curation.recipe import MinHash
from curation.shards import ShardHeader, token_dtype
from curation.steps import HELDOUT, POISONOUS, DecideFates, Documents, TokenTable, TokenWriter, read_packed
from curation.work import Progress, Task, committed, planned, read_attempts, task_folder

BATCH = 100  # documents that are tokenized at once; a token takes 150 bytes meanwhile
SEPARATOR_IN_TEXT = "separator_in_text"  # the rule that drops documents in which text became the separator


# ---- duplicates


class StockFates(DecideFates):
    """DecideFates where the four MinHash steps of datatrove find the near duplicates, all in this one task.

    Exact duplicates go before, by our digest: FineWeb's pipeline has no step for them, and texts below `ngram_words`
    words have no signature there. Of near duplicates stays what datatrove chooses: not that of the earlier source, and
    it depends on the order of the pieces. Neither sketches nor licences are looked at. Memory is not bounded: about
    400 bytes a pair, and 1 kB or more a word of the longest text. A text that kills its process twice is compared with
    none.
    """

    name = "duplicates by datatrove, held-out split"

    def survivors(
        self,
        task: Task,
        folder: Path,
        of_source: np.ndarray,
        digests: np.ndarray,
        sketches: np.ndarray,
        order: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        exact, _ = survivors(digests, (), order)
        alone = exact == np.arange(len(exact))
        stays = exact.copy()
        quarantined = read_attempts(self.work, task.key).quarantined
        for names in [self.sources] if self.across else [(source,) for source in self.sources]:
            keys = [key for source, key in task.values["pieces"] if source in names]
            inside = np.isin(of_source, [self.sources.index(name) for name in names])
            numbers = np.flatnonzero(alone & inside)
            documents = self.documents(keys, alone[inside], quarantined)
            with TemporaryDirectory(dir=folder) as scratch:
                stays[numbers] = numbers[near_duplicates(documents, len(numbers), self.minhash, scratch)]
        return exact, stays[exact]

    def documents(self, keys: Sequence[str], wanted: np.ndarray, quarantined: set[str]) -> Documents:
        """Those documents of the pieces that are wanted, (n,) bool."""
        progress = Progress()
        files = (task_folder(self.work, "read", key) / "documents.jsonl.zst" for key in keys)
        for record, is_wanted in zip(chain.from_iterable(map(read_packed, files)), wanted, strict=True):
            if is_wanted:
                progress.at(record["id"], len(record["text"].encode()))
                yield Document(text="" if record["id"] in quarantined else record["text"], id=record["id"])
        progress.done()


def near_duplicates(documents: Documents, n: int, minhash: MinHash, scratch: str) -> np.ndarray:
    """For each of n documents the place of the one that stays for it, (n,), by datatrove's MinHash stages 1 to 4."""
    from datatrove.pipeline.dedup import (
        MinhashDedupBuckets,
        MinhashDedupCluster,
        MinhashDedupFilter,
        MinhashDedupSignature,
    )
    from datatrove.pipeline.dedup.minhash import MinhashConfig
    from datatrove.utils.hashing import HashConfig

    config = MinhashConfig(
        n_grams=minhash.ngram_words,
        num_buckets=minhash.bands,
        hashes_per_bucket=minhash.rows,
        hash_config=HashConfig(precision=64, hash_fc="sha1"),  # FineWeb's; the default fails with xxhash 4: no str
    )
    signatures, pairs, removed = (f"{scratch}/{name}" for name in ("signatures", "pairs", "removed"))
    MinhashDedupSignature(signatures, config).run(documents)
    for band in range(minhash.bands):
        MinhashDedupBuckets(signatures, pairs, config=config).run(rank=band, world_size=minhash.bands)
    MinhashDedupCluster(pairs, removed, config, save_cluster_id=True).run()

    clusters = np.full(n, -1)

    def by_place() -> Iterator[Document]:  # stage 4 looks at the place of a document alone
        for place in range(n):
            document = Document(text="", id=str(place))
            yield document
            clusters[place] = document.metadata.get("minhash_cluster_id", -1)

    kept = [int(document.id) for document in MinhashDedupFilter(removed, load_cluster_ids=True).run(by_place())]
    stays = np.zeros(clusters.max(initial=-1) + 2, np.int64)  # by cluster; the last place is of those in none
    stays[clusters[kept]] = kept
    return np.where(clusters >= 0, stays[clusters], np.arange(n))


# ---- tokens


class StockTokenWriter(TokenWriter):
    """TokenWriter where datatrove's DocumentTokenizer encodes, with a tokenizer.json.

    A text that spells a special token becomes that token there. Where it is the separator, the document would be two
    in a shard: it is dropped, and counted as `separator_in_text`. What breaks the tokenizer ends the run.
    """

    name = "tokens by datatrove"

    def __init__(self, work: Path, plan: Path, tokenizer_file: Path, header: ShardHeader):
        super().__init__(work, plan, tokenizer_file)
        self.header = header

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> None:
        from datatrove.pipeline.tokens import DocumentTokenizer

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # a worker is one of as many as there are cores
        task = planned(self.plan, rank, world_size)
        table = TokenTable()
        documents: list[Document] = []

        def healthy() -> Iterator[Document]:
            for document in data:
                if document.metadata["poisonous"]:
                    table.lose(document, POISONOUS)
                    continue
                text = document.text if document.metadata["fate"] == HELDOUT else ""  # the rest is not needed again
                documents.append(Document(text=text, id=document.id, metadata=document.metadata))
                yield document

        with committed(task_folder(self.work, "tokens", task.key)) as folder:
            with TemporaryDirectory(dir=folder) as scratch:
                step = DocumentTokenizer(
                    scratch,
                    str(self.tokenizer_file),
                    eos_token=separator_of(self.tokenizer_file, self.header.separator_id),
                    # after a death one at a time, so that the document is known over which the next process dies
                    batch_size=1 if read_attempts(self.work, task.key).deaths else BATCH,
                    shuffle_documents=False,  # the order in the shards is that of the table
                )
                step.run(healthy())
                file = next(Path(scratch).glob("*.ds"))
                stream = np.fromfile(file, f"<u{step.token_size}")
                ends = np.fromfile(f"{file}.index", "<u8").astype(np.int64)
            starts = np.append(0, ends)[: len(documents)]
            separators = np.flatnonzero(stream == self.header.separator_id)
            n_separators = np.searchsorted(separators, ends) - np.searchsorted(separators, starts)
            # theirs stands behind each document: turned by one token, before it
            np.roll(stream, 1).astype(token_dtype(self.header.vocab_size)).tofile(folder / "tokens.bin")
            columns = (starts.tolist(), ends.tolist(), n_separators.tolist())
            for document, start, end, n in zip(documents, *columns, strict=True):
                if n == 1:
                    table.add(document, start, end - start)
                else:
                    table.lose(document, SEPARATOR_IN_TEXT)
            table.write(folder)


def separator_of(tokenizer_file: Path, separator_id: int) -> str:
    """The separator of a tokenizer.json as it is written there."""
    added = json.loads(tokenizer_file.read_bytes())["added_tokens"]
    return next(str(token["content"]) for token in added if token["id"] == separator_id)
