"""What a run reads: the pieces of files that its sources need, and the identity of all of it. Needs no datatrove."""

import json
from collections.abc import Mapping
from pathlib import Path

from curation.recipe import RECIPES, Settings, source_values
from curation.shards import new_file
from curation.sources import Piece, choose_files, list_files, make_pieces, piece_of, with_digests
from curation.work import code_version, key_of


def find_pieces(settings: Settings, mirror: Path | None, work: Path) -> dict[str, tuple[Piece, ...]]:
    """What there is to read: the files of each source that its budget needs, cut into pieces.

    A source on the Hub is listed once: its revision is a commit, so the list in the work folder stays right.
    """
    pieces: dict[str, tuple[Piece, ...]] = {}
    for source in settings.sources:
        kept = None
        if source.repo is not None and mirror is None:
            asked = [source_values(source), RECIPES[settings.recipe].piece_mb, code_version("sources", "hub")]
            kept = work / "listed" / f"{source.name}-{key_of(asked)[:24]}.json"
            if kept.exists():
                pieces[source.name] = tuple(map(piece_of, json.loads(kept.read_bytes())))
                continue
        files = with_digests(choose_files(source, list_files(source, mirror)), work / "listed" / f"{source.name}.json")
        found = make_pieces(source, files, int(RECIPES[settings.recipe].piece_mb * 1e6)) if files else []
        if kept is not None:
            with new_file(kept) as file:
                file.write(json.dumps([piece.values() for piece in found]).encode())
        pieces[source.name] = tuple(found)
    return pieces


def inputs_key(settings: Settings, pieces: Mapping[str, tuple[Piece, ...]]) -> str:
    """Identity of what a finished folder was made from: settings and inputs, not code."""
    return key_of([settings.resolved(), {name: [piece.key for piece in found] for name, found in pieces.items()}])
