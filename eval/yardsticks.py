"""What a model's bits per byte are measured against: gzip, and the best guess that knows only how often a token comes.

Both are needed by the same documents that the model is scored on, so they move with the data and not with the model.
"""

import gzip
from collections import Counter
from math import log2


def gzip_bits_per_byte(texts):
    """Bits that `gzip -9` needs for each byte of the texts, compressed one by one (its 18-byte frame counted)."""
    encoded = [text.encode() for text in texts]
    return 8 * sum(len(gzip.compress(data, 9, mtime=0)) for data in encoded) / sum(map(len, encoded))


def unigram_bits_per_byte(documents, n_bytes):
    """Bits per byte of documents (lists of token ids, n_bytes of text) under their own token frequencies.

    The frequencies come from these very documents, so no model that ignores context can do better.
    """
    counts = Counter(token for document in documents for token in document)
    n_tokens = counts.total()
    return -sum(n * log2(n / n_tokens) for n in counts.values()) / n_bytes
