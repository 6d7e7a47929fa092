"""fastText's models, opened only where the file is whole: of a cut one its library reads on, or crashes."""

import struct
from mmap import ACCESS_READ, mmap
from typing import Any

MAGIC = struct.pack("<i", 793712314)  # how a file begins
CENTROIDS = 256  # of each product quantizer


def load_fasttext(path: str) -> Any:
    """Raises ValueError for what is no whole model."""
    from fasttext.FastText import _FastText

    if not is_whole(path):
        raise ValueError(f"{path} is damaged or not a model of fastText's; give a .bin or .ftz that it made")
    return _FastText(path)


def is_whole(path: str) -> bool:
    """Whether the file is as long as its own sizes say."""
    try:
        with open(path, "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            return data[: len(MAGIC)] == MAGIC and end_of_model(data) == len(data)
    except (struct.error, ValueError, OverflowError):  # sizes that lead out of the file; an empty one
        return False


def end_of_model(data: mmap) -> int:
    """Where a model that starts at 0 ends, as FastText::saveModel of version 0.9 writes it."""
    at = 0

    def read(layout: str) -> tuple[Any, ...]:
        nonlocal at
        values = struct.unpack_from(f"<{layout}", data, at)
        at += struct.calcsize(f"<{layout}")
        return values

    def skip(size: int) -> None:
        nonlocal at
        at += size

    def skip_codes(size: int) -> None:
        """Codes of a product quantizer, a byte each, and what they stand for."""
        skip(size)
        dimensions, *_ = read("iiii")
        skip(4 * CENTROIDS * dimensions)

    def skip_matrix(quantized: bool) -> None:
        if quantized:
            normed, rows, _, codes = read("?qqi")
            skip_codes(codes)
            if normed:
                skip_codes(rows)
        else:
            rows, columns = read("qq")
            skip(4 * rows * columns)

    read("ii12id")  # magic, version; arguments
    entries, _, _, _, pruned = read("iiiqq")
    for _ in range(entries):
        end = data.find(b"\0", at)  # of a word; its count and kind follow
        if end < 0:
            raise ValueError("a word has no end")
        at = end + 1 + 9
    skip(8 * max(pruned, 0))
    (quantized,) = read("?")
    skip_matrix(quantized)
    (output_too,) = read("?")
    skip_matrix(quantized and output_too)
    return at
