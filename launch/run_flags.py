"""The flags of train/launch.py, as cluster.py and doctor.py take them after `--`. Needs no torch."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NoReturn

from curation.shards import read_manifest
from train.config import Plan, TrainConfig, add_flags, make_config, make_plan

ENDLESS = 50304, sys.maxsize  # vocabulary and tokens of data that are not at hand


class OneLineParser(argparse.ArgumentParser):
    """A parser that raises ValueError where argparse would print its usage and leave."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """The words before the first `--`, and those after it."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def parse_run(words: list[str]) -> TrainConfig:
    """Raises ValueError, in one line, for flags that train/launch.py would refuse."""
    parser = OneLineParser(prog="train/launch.py", allow_abbrev=False, add_help=False)
    add_flags(parser, TrainConfig)
    try:
        config, _ = make_config(vars(parser.parse_args(words)))
    except ValueError as error:
        raise ValueError(f"after `--`, the flags of train/launch.py: {error}") from None
    if config.ds_config is not None:
        try:
            json.loads(Path(config.ds_config).read_bytes())
        except OSError as error:
            raise ValueError(f"--ds-config {config.ds_config} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"--ds-config {config.ds_config} is not JSON: {error}") from None
    return config


def plan_run(config: TrainConfig, world_size: int, manifest: dict[str, Any] | None) -> Plan:
    """The plan on so many processes, for the data of a manifest; without one, for data without an end.

    Raises ValueError, in one line, for a plan that cannot be.
    """
    vocab_size, n_tokens = (
        ENDLESS if manifest is None else (manifest["tokenizer"]["vocab_size"], manifest["splits"]["train"]["tokens"])
    )
    return make_plan(config, vocab_size=vocab_size, n_tokens=n_tokens, world_size=world_size)


def run_folder(config: TrainConfig) -> Path:
    assert config.run is not None  # make_config names it
    return Path(config.run)


def find_manifest(config: TrainConfig) -> dict[str, Any] | None:
    """The data folder's manifest, or None where there is no finished folder on this machine."""
    try:
        return read_manifest(config.data)
    except (OSError, ValueError):
        return None
