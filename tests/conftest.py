"""A small finished data folder, shared by the tests; no GPU unless asked for, no network, one thread a process."""

import os
import signal

import pytest

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
# A shell that starts the tests in the background has them ignore Ctrl-C, and so the programs that they send it to.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="let the tests see the GPUs; without it all run on the CPU")


def pytest_configure(config):
    if not config.getoption("--gpu"):
        os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="")
        os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported, which other tests' packages do too


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A finished data folder of the standard library's documentation topics: two sources, vocabulary 512."""
    from pydoc_data.topics import topics

    from small_data import finish_folder

    from curation.tokenizer import load_tokenizer, train_tokenizer

    folder = tmp_path_factory.mktemp("data") / "topics"
    texts = [topics[name] for name in sorted(topics)][:60]
    train_tokenizer(texts, 512, folder / "tokenizer.model")
    shares = {"train": {"one": texts[:30], "two": texts[30:52]}, "heldout": {"one": texts[52:56], "two": texts[56:]}}
    return finish_folder(folder, load_tokenizer(folder), shares)
