"""Preflight: test every node before a run starts, and name the one that is slow or broken.

deepspeed --hostfile=hostfile --module launch.doctor -- --size 13B --data data/eight --run runs/13B
python -m launch.doctor                         this machine's first GPU alone, without a run

Started like the run itself, one process a GPU (launch.cluster --preflight does it); what stands behind `--` are the
run's own flags. The processes tell what they find through a store, so that one that is missing or silent is named
instead of waited for; only the tests of the links need all of them. Exit codes: 0 all nodes are fine, 1 a node is
broken, 2 wrong flags.
"""

import argparse
import dataclasses
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

if __spec__ is None:  # run by path: import from the repo root, not from this folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # a store that does not answer is one line of ours, not pages

import torch
import torch.distributed as dist
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from launch.checks import finish, note_in, own_checks, sees_note
from launch.run_flags import OneLineParser, parse_run, plan_run, split_words
from train.config import TrainConfig
from train.exit_codes import BAD_INPUT, DONE, FAILED
from train.hardware import gpu_of, load_gpus

CLOCK_SECONDS = 2.0  # certificates and the dates of shared files bear so much; the measurement errs by less
LEAVE_SECONDS = 20.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where this process stands, by the environment that DeepSpeed's launcher, torchrun or our Slurm script set."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int
    node: int


def find_place() -> Place:
    def number(*names: str, default: int) -> int:
        return int(next((os.environ[name] for name in names if name in os.environ), default))

    rank, local_size = number("RANK", default=0), number("LOCAL_WORLD_SIZE", "LOCAL_SIZE", default=1)
    return Place(
        rank=rank,
        world_size=number("WORLD_SIZE", default=1),
        local_rank=number("LOCAL_RANK", default=0),
        local_size=local_size,
        node=number("GROUP_RANK", "CROSS_RANK", default=rank // local_size),
    )


def open_store(place: Place, seconds: float) -> dist.Store:
    """The store that all processes share: torchrun's own, or one that rank 0 opens one port above the run's.

    Raises OSError, in one line, when it does not answer.
    """
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", 29500))
    torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    port += not torchruns  # else a late process of the doctor might meet the run
    try:
        store = dist.TCPStore(
            address, port, is_master=place.rank == 0 and not torchruns, wait_for_workers=False,
            timeout=timedelta(seconds=seconds),
        )  # fmt: skip
    except RuntimeError as error:
        who = "cannot be opened" if place.rank == 0 else f"does not answer within {seconds:.0f} s"
        raise OSError(f"rank 0's store at {address}:{port} {who} ({str(error).splitlines()[0]})") from None
    return dist.PrefixStore("doctor", store)


class Board:
    """What the processes tell one another: JSON under a name and a rank."""

    def __init__(self, store: dist.Store, rank: int) -> None:
        self.store, self.rank = store, rank

    def tell(self, name: str, value: Any) -> None:
        self.store.set(f"{name}/{self.rank}", json.dumps(value))

    def hear(self, name: str, rank: int, seconds: float) -> Any:
        """What one rank tells. Raises TimeoutError."""
        key = f"{name}/{rank}"
        try:
            self.store.wait([key], timedelta(seconds=seconds))
        except RuntimeError:
            raise TimeoutError(f"rank {rank} did not tell {name!r} within {seconds:.0f} s") from None
        return json.loads(self.store.get(key))

    def gather(self, name: str, ranks: list[int], seconds: float) -> dict[int, Any]:
        """What those of the ranks tell who do so in time."""
        keys, deadline = [f"{name}/{rank}" for rank in ranks], time.monotonic() + seconds
        while not self.store.check(keys) and time.monotonic() < deadline:
            time.sleep(0.1)
        there = [rank for rank, key in zip(ranks, keys, strict=True) if self.store.check([key])]
        return {rank: json.loads(self.store.get(f"{name}/{rank}")) for rank in there}


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """What work() returns or raises; TimeoutError when it takes longer, in which case its thread is left behind."""
    result: dict[str, Any] = {}

    def run() -> None:
        try:
            result["value"] = work()
        except Exception as error:  # handed on below
            result["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"not done within {seconds:.0f} s")
    if "error" in result:
        raise result["error"]
    return result["value"]


# ---- links


def exchange_rounds(n_nodes: int) -> list[list[tuple[int, int]]]:
    """Pairs of neighbours on a ring, in rounds in each of which a node is in one pair at most."""
    if n_nodes < 2:
        return []
    even = [(i, i + 1) for i in range(0, n_nodes - 1, 2)]
    odd = [(i, i + 1) for i in range(1, n_nodes - 1, 2)]
    last = [(n_nodes - 1, 0)] if n_nodes > 2 else []
    if n_nodes % 2 == 0:
        return [pairs for pairs in (even, odd + last) if pairs]
    return [pairs for pairs in (even, odd, last) if pairs]


def test_links(
    board: Board, order: dict[str, Any], place: Place, seconds: float, say: Callable[[int, str], None]
) -> dict[str, Any]:
    """Rates of the links that this rank is on. All ranks of order["ranks"] call it.

    order: "ranks", "nodes" (the node of each), "backend". say(stage, what) is told before each part. Returns
    {"node_gb_s", "exchanges": [[other node, GB/s], ...], "all_gb_s"}; all-reduces count as their busiest link.
    """
    ranks, nodes = order["ranks"], dict(zip(order["ranks"], order["nodes"], strict=True))
    me = ranks.index(place.rank)
    on_gpu = order["backend"] == "nccl"
    device = torch.device("cuda", place.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)  # each thread has its own
    say(0, "meeting the others")
    # over a connection of its own: while it waits for somebody, the other can still tell
    dist.init_process_group(
        order["backend"], store=dist.PrefixStore("links", board.store.clone()), rank=me, world_size=len(ranks),  # type: ignore[attr-defined]
        timeout=timedelta(seconds=seconds),
    )  # fmt: skip
    data = torch.ones((256 << 20 if on_gpu else 4 << 20) // 4, device=device)

    def rate(work: Callable[[], None], n_bytes: float) -> float:
        times = []
        for _ in range(4):
            finish(device)
            began = time.perf_counter()
            work()
            finish(device)
            times.append(time.perf_counter() - began)
        return n_bytes / statistics.median(times[1:]) / 1e9  # the first opens the connections

    def all_reduce(group: dist.ProcessGroup | None, n: int) -> float:
        return rate(lambda: dist.all_reduce(data, group=group), 2 * (n - 1) / n * data.nbytes)

    found: dict[str, Any] = {"exchanges": []}
    present = sorted(set(nodes.values()))
    by_node = {node: [i for i, rank in enumerate(ranks) if nodes[rank] == node] for node in present}
    here = by_node[place.node]
    lane = here.index(me)  # this rank's counterpart on another node has the same

    def new_group(members: list[int]) -> dist.ProcessGroup:
        # known to its members alone, by a name that counts the groups: so every rank makes one each time
        return dist.new_group(sorted(members), use_local_synchronization=True)

    say(1, "an all-reduce within the node")
    within_node = new_group(here)
    if len(here) > 1:
        found["node_gb_s"] = all_reduce(within_node, len(here))
    rounds = exchange_rounds(len(present))
    for round_number, pairs in enumerate(rounds):
        neighbours = {present[a]: present[b] for pair in pairs for a, b in (pair, pair[::-1])}
        other = neighbours.get(place.node)
        if other is None or lane >= len(by_node[other]):
            new_group([me])
            continue
        say(2 + round_number, f"an exchange with node {other}")
        partner, received = by_node[other][lane], torch.empty_like(data)
        pair_group = new_group([me, partner])  # NCCL would connect everybody for a pair of a group of all
        both = [
            dist.P2POp(dist.isend, data, partner, group=pair_group),
            dist.P2POp(dist.irecv, received, partner, group=pair_group),
        ]

        def exchange(both: list[dist.P2POp] = both) -> None:
            for work in dist.batch_isend_irecv(both):
                work.wait()

        found["exchanges"].append([other, rate(exchange, data.nbytes)])
    if len(ranks) > 1:
        say(2 + len(rounds), "an all-reduce over all")
        found["all_gb_s"] = all_reduce(None, len(ranks))
    return found


# ---- what rank 0 makes of it


@dataclasses.dataclass(kw_only=True)
class Findings:
    """All that was told: by rank where it is of a rank, and what is wrong by node."""

    names: dict[int, str]  # of the nodes
    nodes: dict[int, int]  # the node of each rank that joined
    problems: dict[int, list[str]]
    own: dict[int, Any] = dataclasses.field(default_factory=dict)
    asked: list[int] = dataclasses.field(default_factory=list)  # the ranks that test the links
    links: dict[int, Any] = dataclasses.field(default_factory=dict)

    def blame(self, node: int, text: str) -> None:
        if text not in self.problems.setdefault(node, []):
            self.problems[node].append(text)


def name_nodes(joined: dict[int, Any], hosts: list[str] | None) -> dict[int, str]:
    """By --hosts, else by what the nodes call themselves; with a number where two say the same."""
    own = {told["node"]: told["host"] for told in joined.values()}
    twice = Counter(own.values())
    names = {node: host if twice[host] == 1 else f"{host}#{node}" for node, host in own.items()}
    return names | dict(enumerate(hosts or []))


def find_odd(found: Findings, what: str, values: dict[int, str]) -> None:
    """Blame the nodes whose value is not that of most; with no majority, those that differ from the first."""
    counts = Counter(values.values())
    first = values[min(values)]
    usual = max(counts, key=lambda value: (counts[value], value == first))
    for node, value in values.items():
        if value != usual:
            others = found.names[min(n for n, v in values.items() if v == usual)]
            found.blame(
                node, f"{what} {value} here, {usual} on {others}" + (" and others" if counts[usual] > 1 else "")
            )


def find_slow(found: Findings, what: str, unit: str, rates: list[tuple[int, str, float]], least: float) -> None:
    """Blame those below a part of the median of all; of two, of the faster. rates: (node, "rank 3: " or "", rate)."""
    if len(rates) < 2:
        return
    median = statistics.median_high(rate for _, _, rate in rates)
    for node, who, rate in rates:
        if rate < least * median:
            found.blame(
                node, f"{who}{what} {rate:.3g} {unit}, {rate / median:.0%} of the median {median:.3g} ({least:.0%})"
            )


def judge(found: Findings, flags: argparse.Namespace) -> None:
    """Compare what the nodes told, and note what is wrong with which."""
    for rank, report in found.own.items():
        for problem in report["problems"]:
            found.blame(found.nodes[rank], problem)
    judge_nodes(found, flags)
    judge_links(found, flags)


def first_ranks(found: Findings) -> dict[int, Any]:
    """What the first rank of each node found."""
    return {found.nodes[rank]: found.own[rank]["findings"] for rank in sorted(found.own, reverse=True)}


def judge_nodes(found: Findings, flags: argparse.Namespace) -> None:
    """Versions, manifests, products and copies."""
    firsts = first_ranks(found)
    versions = {node: told["versions"] for node, told in firsts.items() if told["versions"]}
    for what in sorted(set().union(*versions.values())):
        find_odd(found, what, {node: told.get(what, "missing") for node, told in versions.items()})
    manifests = {node: told["manifest"][:12] for node, told in firsts.items() if told.get("manifest")}
    if manifests:
        find_odd(found, "the data's manifest is", manifests)
    products, copies = (
        [
            (found.nodes[rank], f"rank {rank}: ", report["findings"][kind])
            for rank, report in found.own.items() if kind in report["findings"]
        ]
        for kind in ("product_tflops", "to_device_gb_s")
    )  # fmt: skip
    find_slow(found, "host to GPU runs at", "GB/s", copies, flags.least_of_median)
    for node, who, rate in products:
        gpu = gpu_of(versions[node].get("GPU", ""))
        if gpu and rate < flags.least_of_peak * gpu.dense_tflops["bf16"]:
            peak = gpu.dense_tflops["bf16"]
            part = f"{rate / peak:.0%} of the {gpu.title}'s {peak} ({flags.least_of_peak:.0%})"
            found.blame(node, f"{who}a matrix product runs at {rate:.0f} TFLOP/s, {part}")
    if not any("GPU" in told for told in versions.values()):  # processes share a node's cores, by chance unequally
        whole: Counter[int] = Counter()
        for node, _, rate in products:
            whole[node] += rate
        products = [(node, "", rate) for node, rate in whole.items()]
    find_slow(found, "a matrix product runs at", "TFLOP/s", products, flags.least_of_median)


def judge_links(found: Findings, flags: argparse.Namespace) -> None:
    """Who did not answer, who hung first, and whose links are slow."""
    silent = [rank for rank in found.asked if rank not in found.links]
    for rank in silent:
        found.blame(found.nodes[rank], f"rank {rank} fell silent in the tests of the links")
    stuck = {rank: told["stuck"] for rank, told in found.links.items() if "stuck" in told}
    for rank, (stage, what, why) in stuck.items():
        if not silent and stage == min(told[0] for told in stuck.values()):  # the others waited for these
            found.blame(found.nodes[rank], f"rank {rank}: {name_in(found, what)} did not end: {why}")
    finished = {rank: told for rank, told in found.links.items() if "stuck" not in told}
    inside = {found.nodes[rank]: told["node_gb_s"] for rank, told in finished.items() if "node_gb_s" in told}
    what = "an all-reduce within the node runs at"
    find_slow(found, what, "GB/s", [(node, "", rate) for node, rate in inside.items()], flags.least_of_median)
    firsts = first_ranks(found)
    for node, rate in inside.items():
        gpu = gpu_of(firsts[node]["versions"].get("GPU", ""))
        if gpu and rate < flags.least_of_link * gpu.link_gb_s:
            part = f"{rate / gpu.link_gb_s:.0%} of {gpu.link}'s {gpu.link_gb_s} ({flags.least_of_link:.0%})"
            found.blame(node, f"{what} {rate:.3g} GB/s, {part}")
    # a slow node has no fast link; its neighbours have one with their other neighbour
    best = [
        (found.nodes[rank], f"rank {rank}: ", max(rate for _, rate in told["exchanges"]))
        for rank, told in finished.items() if told["exchanges"]
    ]  # fmt: skip
    what = "the best link to another node runs at"
    find_slow(found, what, "GB/s", best, flags.least_of_median)
    for node, who, rate in best:
        if flags.network_gb_s and rate < flags.network_gb_s:
            found.blame(node, f"{who}{what} {rate:.3g} GB/s, not {flags.network_gb_s} (--network-gb-s)")


def name_in(found: Findings, what: str) -> str:
    """The same text with the name of the node in the place of its number."""
    before, node, number = what.rpartition("node ")
    return f"{before}{found.names[int(number)]}" if node and number.isdigit() else what


def show(found: Findings, world_size: int) -> None:
    """The table, then a line for each problem, then the verdict."""
    n_nodes = max(found.names) + 1
    console = Console(width=None if Console().is_terminal else 160, highlight=False)
    table = Table("node", "GPU", "ranks", "product TFLOP/s", "to GPU GB/s", "in node GB/s", "best link GB/s",
                  "free disk GB", "data", "verdict", box=SIMPLE_HEAD)  # fmt: skip

    def span(values: list[float]) -> str:
        low, high = (f"{value:.3g}" for value in (min(values), max(values))) if values else ("-", "-")
        return low if low == high else f"{low} to {high}"

    for node in range(n_nodes):
        ranks = sorted(rank for rank in found.nodes if found.nodes[rank] == node)
        own = [found.own[rank]["findings"] for rank in ranks if rank in found.own]
        links = [found.links[rank] for rank in ranks if rank in found.links]
        first = own[0] if own else {}
        table.add_row(
            found.names[node],
            first.get("versions", {}).get("GPU", "none"),
            f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else ", ".join(map(str, ranks)) or "-",
            span([told["product_tflops"] for told in own if "product_tflops" in told]),
            span([told["to_device_gb_s"] for told in own if "to_device_gb_s" in told]),
            span([told["node_gb_s"] for told in links if "node_gb_s" in told]),
            span([max(rate for _, rate in told["exchanges"]) for told in links if told.get("exchanges")]),
            f"{first['free_bytes'] / 1e9:.0f}" if "free_bytes" in first else "-",
            (first.get("manifest") or "-")[:12],
            "broken" if found.problems.get(node) else "fine",
        )
    console.print(table)
    rates = [told["all_gb_s"] for told in found.links.values() if "all_gb_s" in told]
    if rates:
        print(f"an all-reduce over {len(rates)} processes: {statistics.median(rates):.3g} GB/s on the busiest link")
    broken = [node for node in sorted(found.problems) if found.problems[node]]
    for node in broken:
        for problem in found.problems[node]:
            print(f"{found.names[node]}: {problem}")
    if broken:
        names = ", ".join(found.names[node] for node in broken)
        print(f"preflight: {len(broken)} of {n_nodes} nodes broken or slow: {names}", flush=True)
    else:
        print(f"preflight: fine (nodes: {n_nodes}, processes: {world_size})", flush=True)


# ---- the course of it


def examine(place: Place, flags: argparse.Namespace, config: TrainConfig | None) -> int:
    """Every rank calls it. Returns the exit code, the same on all that heard the verdict. OSError or TimeoutError, in
    one line, without rank 0."""
    board = Board(open_store(place, flags.join_seconds), place.rank)
    board.tell("joined", {"node": place.node, "host": socket.gethostname()})
    if place.rank == 0:
        return lead(board, place, flags, config)
    note = board.hear("note", 0, flags.join_seconds + LEAVE_SECONDS)
    board.tell("own", {"clock": time.time()} | own_report(place, flags, config, note))
    order = board.hear("order", 0, 1.2 * flags.test_seconds + LEAVE_SECONDS)
    if place.rank in order["ranks"]:
        board.tell("links", links_report(board, order, place, flags))
    code = board.hear("verdict", 0, 2 * flags.test_seconds + LEAVE_SECONDS)
    board.tell("left", True)
    return code


def lead(board: Board, place: Place, flags: argparse.Namespace, config: TrainConfig | None) -> int:
    """Rank 0's part of examine: it tests too, and says who does what when, and what came of it."""
    joined = board.gather("joined", list(range(place.world_size)), flags.join_seconds)
    found = who_came(place, flags, joined)
    note = f".preflight-{os.getpid()}-{time.time_ns()}"
    with note_in(config, note) if config else nullcontext() as problem:
        if problem:
            found.blame(place.node, problem)
        board.tell("note", note if config and not problem else None)
        started = time.time()
        board.tell("own", {"clock": started} | own_report(place, flags, config, None))
        found.own = board.gather("own", sorted(joined), 1.2 * flags.test_seconds)
    for rank in joined.keys() - found.own.keys():
        found.blame(found.nodes[rank], f"rank {rank} joined and then fell silent for {flags.test_seconds:.0f} s")
    for rank, told in found.own.items():
        if abs(told["clock"] - started) > CLOCK_SECONDS:
            found.blame(found.nodes[rank], f"its clock is {told['clock'] - started:+.1f} s off that of rank 0")

    able = sorted(rank for rank, told in found.own.items() if told["able"])
    on_gpus = all("GPU" in found.own[rank]["findings"]["versions"] for rank in able)
    found.asked = able if len(able) > 1 else []
    nodes = [found.nodes[rank] for rank in found.asked]
    order = {"ranks": found.asked, "nodes": nodes, "backend": "nccl" if on_gpus else "gloo"}
    board.tell("order", order)
    if place.rank in found.asked:
        board.tell("links", links_report(board, order, place, flags))
    found.links = board.gather("links", found.asked, 1.2 * flags.test_seconds)

    judge(found, flags)
    show(found, place.world_size)
    code = FAILED if any(found.problems.values()) else DONE
    board.tell("verdict", code)
    board.tell("left", True)
    silent = set(found.asked) - found.links.keys()
    board.gather("left", sorted(found.own.keys() - silent), LEAVE_SECONDS)  # the store ends with this process
    return code


def own_report(
    place: Place, flags: argparse.Namespace, config: TrainConfig | None, note: str | None
) -> dict[str, Any]:
    """This rank's own tests, and whether its node sees the file that rank 0 wrote into the run's folder."""

    def work() -> dict[str, Any]:
        return own_checks(config, place.world_size, place.local_rank, place.local_size, flags.verify_data)

    try:
        report = within(flags.test_seconds, work)
    except TimeoutError as error:
        return {
            "findings": {"versions": {}},
            "problems": [f"rank {place.rank}: its own tests: {error}"],
            "able": False,
        }
    if config and note and place.local_rank == 0 and not sees_note(config, note):
        report["problems"].append(f"does not see the file that rank 0 wrote to {config.run}: it must be shared")
    return report


def links_report(board: Board, order: dict[str, Any], place: Place, flags: argparse.Namespace) -> dict[str, Any]:
    at: list[Any] = [0, "nothing yet"]

    def say(stage: int, what: str) -> None:
        at[:] = stage, what

    try:
        # gloo's own limit comes first, and says more
        return within(flags.test_seconds, lambda: test_links(board, order, place, 0.8 * flags.test_seconds, say))
    except (TimeoutError, RuntimeError) as error:  # RuntimeError: gloo's and NCCL's
        return {"stuck": [*at, (str(error).splitlines() or [type(error).__name__])[0]]}


def who_came(place: Place, flags: argparse.Namespace, joined: dict[int, Any]) -> Findings:
    """Who is there, and blame for the nodes that did not come."""
    hosts = flags.hosts.split(",") if flags.hosts else None
    names = name_nodes(joined, hosts)
    nodes = {rank: told["node"] for rank, told in joined.items()}
    found = Findings(names=names, nodes=nodes, problems={})
    missing: dict[int, list[int]] = {}
    for rank in sorted(set(range(place.world_size)) - joined.keys()):
        missing.setdefault(rank // place.local_size, []).append(rank)
    for node, ranks in missing.items():
        found.names.setdefault(node, f"node {node}")
        which = f"ranks {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"rank {ranks[0]}"
        found.blame(node, f"{which} did not join within {flags.join_seconds:.0f} s")
    return found


def main(argv: list[str] | None = None) -> int:
    own, words = split_words(sys.argv[1:] if argv is None else argv)
    place = find_place()
    parser = OneLineParser(
        prog="launch.doctor", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--hosts", metavar="NAME,NAME", help="the nodes' names in the order of ranks (default: their own)"
    )
    parser.add_argument("--join-seconds", type=float, default=120.0, help="how long a node may take to come (120)")
    parser.add_argument("--test-seconds", type=float, default=300.0, help="how long its tests may take (300)")
    parser.add_argument(
        "--least-of-median", type=float, default=0.85, help="a rate below this part of the median is slow (0.85)"
    )
    parser.add_argument(
        "--least-of-peak", type=float, default=0.6, help="a product below this part of the GPU's peak is slow (0.6)"
    )
    parser.add_argument(
        "--least-of-link", type=float, default=0.3,
        help="an all-reduce within a node below this part of its links' peak is slow (0.3)",
    )  # fmt: skip
    parser.add_argument(
        "--network-gb-s", type=float, default=0.0,
        help="what a GPU's link to another node carries at least (default: the links are compared with each other)",
    )  # fmt: skip
    parser.add_argument("--verify-data", action="store_true", help="hash every shard on every node")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed always passes it
    try:
        flags = parser.parse_args(own)
        load_gpus()  # what is wrong there must not end the tests when they are to be judged
        config = parse_run(words) if words else None
        if config:
            plan_run(config, place.world_size, manifest=None)  # the same on all nodes, whatever lies there
    except ValueError as error:
        if place.rank == 0:
            print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    # a watchdog of NCCL would end the process that has to say what hangs
    os.environ.update(TORCH_NCCL_ASYNC_ERROR_HANDLING="0", TORCH_NCCL_ENABLE_MONITORING="0")
    try:
        return examine(place, flags, config)
    except (OSError, TimeoutError) as error:
        print(f"error: {error} (rank {place.rank} on {socket.gethostname()})", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads that wait for a lost process would not end
