"""Files of data sets on the Hugging Face Hub: which there are, and reading parts of them without downloading.

A file is asked for once (the Hub counts these requests); its bytes then come from where the answer points to, in
ranges. Requests are made again, with longer and longer waits, as long as the network, the server or a limit of
requests is what fails. Addresses: hf://datasets/<owner>/<name>@<commit>/<file>; the server is that of HF_ENDPOINT.
"""

import io
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlparse

HUB = "hf://datasets/"
RETRIES = 8
MAX_WAIT_S = 60.0  # between two tries: 1, 2, 4, ... seconds, at most these; about three minutes in all
BUFFER_BYTES = 1 << 22  # read ahead: a request takes longer than so many bytes


def list_repo(repo: str, revision: str | None, paths: tuple[str, ...] = ("*",)) -> list[tuple[str, int, str]]:
    """(name, bytes, digest) of the files of a data set at a commit whose names match one of the patterns.

    The digest is the sha256 of the content, or, of small files that git itself holds, the name of their object.
    Raises FileNotFoundError where there is no such data set or commit, ValueError for one that is gated, and
    ConnectionError when the Hub does not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.hf_api import RepoFile
    from huggingface_hub.utils import get_session

    transport_errors = type(get_session()).__module__.split(".")[0]
    where = f"data set {repo} at {revision or 'its newest commit'}"
    found = {}
    try:
        for folder in sorted({literal_folder(pattern) for pattern in paths}):
            entries = HfApi().list_repo_tree(
                repo, folder or None, recursive=True, revision=revision, repo_type="dataset"
            )
            for entry in entries:
                if isinstance(entry, RepoFile) and any(fnmatch(entry.path, pattern) for pattern in paths):
                    digest = entry.lfs.sha256 if entry.lfs else entry.blob_id
                    found[entry.path] = (entry.path, entry.size, digest)
    except GatedRepoError:
        raise ValueError(f"{where} is gated: accept its terms on the Hub and log in, or take another source") from None
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError):
        raise FileNotFoundError(f"{where} is not on the Hub, or has no {' or '.join(paths)}") from None
    except (HfHubHTTPError, OfflineModeIsEnabled) as error:
        raise ConnectionError(f"{where}: {first_line(error)}") from None
    except Exception as error:
        if type(error).__module__.split(".")[0] != transport_errors:
            raise
        raise ConnectionError(f"{where}: the Hub does not answer ({first_line(error)})") from None
    return list(found.values())


def literal_folder(pattern: str) -> str:
    """`sample/100BT` of sample/100BT/*.parquet: the folder that every match lies in."""
    folders = []
    for part in PurePosixPath(pattern).parts[:-1]:
        if any(sign in part for sign in "*?["):
            break
        folders.append(part)
    return "/".join(folders)


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def open_file(path: str) -> BinaryIO:
    """A file of this machine or of the Hub, for reading, with seek. Raises OSError, ConnectionError among them."""
    if path.startswith(HUB):
        return io.BufferedReader(HubFile(path), BUFFER_BYTES)
    return open(path, "rb")


class HubFile(io.RawIOBase):
    """A file of the Hub; every read is one request for a range."""

    def __init__(self, path: str):
        super().__init__()
        self.path = path
        self.position = 0
        self.size_bytes = resolve(path)[1]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size_bytes}[whence]
        self.position = max(origin + offset, 0)
        return self.position

    def readinto(self, buffer: Any) -> int:
        stop = min(self.position + len(buffer), self.size_bytes)
        if stop <= self.position:
            return 0
        data = read_range(self.path, self.position, stop)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


@lru_cache(maxsize=1024)
def resolve(path: str) -> tuple[str, int]:
    """(address that the bytes come from, size) of a file. Raises ConnectionError."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    repo, _, rest = path.removeprefix(HUB).partition("@")
    revision, _, name = rest.partition("/")
    url = hf_hub_url(repo, name, repo_type="dataset", revision=revision)
    try:
        found = get_hf_file_metadata(url, retry_on_errors=True)
    except Exception as error:  # of the library, its transport or the server: for the reader it is all the same
        raise ConnectionError(f"{path}: {first_line(error)}") from None
    if found.size is None:
        raise ConnectionError(f"{path}: the server does not say how large it is")
    return found.location, found.size


def read_range(path: str, start: int, stop: int) -> bytes:
    """The bytes start <= i < stop of a file. Raises ConnectionError when every try failed."""
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, http_backoff

    last = ""
    for _ in range(3):  # an address is valid for an hour or so
        location, size_bytes = resolve(path)
        headers = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        if urlparse(location).netloc == urlparse(constants.ENDPOINT).netloc:  # the Hub may want to know who asks
            headers = build_hf_headers() | headers
        try:
            answer = http_backoff(
                "GET", location, max_retries=RETRIES, max_wait_time=MAX_WAIT_S, headers=headers, follow_redirects=True
            )
        except Exception as error:
            raise ConnectionError(f"{path}: {first_line(error)}") from None
        if answer.status_code == 206 and len(answer.content) == stop - start:
            return answer.content
        if answer.status_code == 200 and len(answer.content) == size_bytes:  # a small file, given whole
            return answer.content[start:stop]
        last = f"status {answer.status_code}, {len(answer.content):,} bytes of {stop - start:,}"
        resolve.cache_clear()
    raise ConnectionError(f"{path}: {last}")
