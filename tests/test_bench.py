"""What a bench prints is what a run did: a run of the trainer, its kernels in groups, and peers of the same shape."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch.multiprocessing as multiprocessing
from launching import ROOT, free_port

from model.config import PRESETS
from train.bench import floors, make_random_data, tokens_of_a_step
from train.bench_peers import main as peers
from train.config import make_plan
from train.hardware import get_gpu
from train.profiler import group_of, kernel_times, own_times
from train.profiler import main as profiler

TINY = ["--size", "tiny", "--grad-accum", "2", "--warm-up", "1", "--steps", "2"]


def bench(*flags):
    command = [sys.executable, "-m", "train.bench", *map(str, flags)]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | {"DS_ACCELERATOR": "cpu"}, capture_output=True, text=True, timeout=200
    )


@pytest.fixture(scope="module")
def benched(tmp_path_factory):
    """The JSON, the output and the run's folder of a bench on two processes."""
    folder = tmp_path_factory.mktemp("bench")
    out, kept = folder / "bench.json", folder / "run"
    result = bench(*TINY, "--gpus", 2, "--json", out, "--keep", kept, "--", "--micro-batch", 2, "--lr", 1e-3)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(out.read_text()), result.stdout, kept


def test_bench_reports_a_run_of_the_trainer(benched):
    figures, said, kept = benched
    rows = [json.loads(line) for line in (kept / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    both_steps = rows[2]["seconds"] - rows[0]["seconds"]  # the second and the third; the first warms up
    assert figures["tokens_per_s"] == pytest.approx(2 * figures["batch_tokens"] / both_steps)
    assert figures["tokens_per_s_per_gpu"] == figures["tokens_per_s"] / 2
    assert (figures["micro_batch"], figures["grad_accum"], figures["batch_tokens"]) == (2, 2, 2 * 2 * 2 * 64)
    assert figures["losses"] == [row["loss"] for row in rows]
    assert figures["gap_ms"] == pytest.approx(figures["step_ms"] - figures["busy_ms"])
    assert json.loads((kept / "config.json").read_text())["run"]["lr"] == 1e-3
    assert not (kept / "checkpoints").exists()
    assert f"{figures['tokens_per_s']:,.0f}" in said
    assert {"command", "run", "git_commit", "versions", "gpu", "day", "start_up_s"} <= figures.keys()


def test_run_leaves_the_recorded_step_and_its_trace(benched, capsys):
    figures, _, kept = benched
    times = json.loads((kept / "profile/times.json").read_text())
    assert times["steps"] == [4, 4]
    assert {"products", "communication"} <= {group["group"] for group in times["groups"]}
    assert sum(group["ms"] for group in times["groups"]) == pytest.approx(figures["busy_ms"], rel=0.2)
    assert profiler([str(kept / "profile/trace.json.gz")]) == 0
    assert "products" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--steps", 0], "--steps 0 is too small"),
        (["--size", "1.4B"], "unknown size '1.4B'"),
        (["--", "--micro-batch", "auto"], "--batch-tokens"),
        (["--size", "tiny", "--data", "nowhere"], "data folder nowhere does not exist"),
    ],
)
def test_bench_refuses_in_one_line(flags, said):
    result = bench(*flags)
    assert result.returncode in (1, 2)
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_a_step_is_so_many_micro_batches_on_each_gpu():
    class Flags:
        size, gpus, grad_accum = "1.3B", 2, 8

    data = ["--data", "x"]
    assert tokens_of_a_step(data, Flags) == 2 * 8 * 4 * 8192
    assert tokens_of_a_step([*data, "--micro-batch", "8", "--seq-len", "4096"], Flags) == 2 * 8 * 8 * 4096
    assert tokens_of_a_step([*data, "--micro-batch", "auto", "--batch-tokens", "65536"], Flags) == 65536


def test_random_data_is_a_whole_folder_of_documents_of_about_1024_tokens(tmp_path):
    from curation.shards import file_names, open_stream, read_manifest, verify_files

    make_random_data(tmp_path / "data", 512, 100_000)
    verify_files(tmp_path / "data", file_names(read_manifest(tmp_path / "data")))
    stream = open_stream(tmp_path / "data", "train")
    assert 100_000 <= stream.n_tokens < 101_000
    assert stream.n_tokens / stream.n_documents == pytest.approx(1024, rel=0.02)


# ---- kernels


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "products"),
        ("nvjet_qqtst_128x256_128x4_2x1_v_bz_TNT", "products, fp8"),
        ("nvjet_sm90_qrtst_256x128_128x4_1x2_h_bz_coopA_TNT", "products, fp8"),
        ("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_3i_128x128x128", "attention"),
        ("void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>", "attention"),
        ("_chunk_scan_chunk_state_bwd_dx_kernel", "scan"),
        ("_scan_forward_kernel", "scan"),
        ("_conv_backward_kernel", "convolution"),
        ("void causal_conv1d_channellast_fwd_kernel<Causal_conv1d_channellast_fwd_kernel_traits>", "convolution"),
        ("_layer_norm_bwd_kernel", "norms"),
        ("_gating_forward_kernel", "element-wise"),
        ("_gated_norm_forward_kernel", "norms"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::silu_kernel>", "element-wise"),
        ("void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda>", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel_cuda>", "casts"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float, 4>>", "optimizer"),
        ("_cross_entropy_kernel", "cross entropy"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "communication"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("some_unknown_kernel", "other"),
    ],
)
def test_kernels_are_grouped_by_name(name, group):
    assert group_of(name) == group


def event(name, start, duration, kind="kernel", thread=1):
    return {"cat": kind, "name": name, "ts": start, "dur": duration, "pid": 0, "tid": thread}


def test_time_in_which_two_kernels_run_is_busy_once_and_counts_for_both():
    events = [
        event("nvjet_tst", 0, 1000), event("ncclDevKernel", 500, 1000, thread=2), event("nvjet_tst", 4000, 1000),
        event("aten::mm", 0, 9000, kind="cpu_op"), event("Optimizer.step", 0, 9000, kind="gpu_user_annotation"),
    ]  # fmt: skip
    times = kernel_times(events, wall_ms=10.0, n_steps=2)
    assert times["wall_ms"] == 5.0
    assert times["busy_ms"] == 1.25
    assert times["groups"] == [
        {"group": "products", "ms": 1.0, "launches": 1.0}, {"group": "communication", "ms": 0.5, "launches": 0.5}
    ]  # fmt: skip


def test_operation_of_the_cpu_counts_without_those_that_it_calls():
    operations = [event("linear", 0, 10), event("mm", 2, 5), event("add", 20, 4), event("mm", 0, 3, thread=2)]
    own = {}
    for _, duration, name in own_times(operations):
        own[name] = own.get(name, 0) + duration
    assert own == {"linear": 5, "mm": 8, "add": 4}


def test_what_is_no_trace_is_refused(tmp_path, capsys):
    (tmp_path / "trace.json.gz").write_bytes(b"not packed")
    assert profiler([str(tmp_path / "trace.json.gz")]) == 2
    assert "is no trace" in capsys.readouterr().err


def test_floor_of_the_products_is_their_flops_at_the_peak():
    shape, gpu = PRESETS["1.3B-gated"], get_gpu("h200")
    found = floors(shape, 32_768, 1, gpu, {"products"})
    by_hand = 3 * 2 * 32_768 * (shape.n_parameters - shape.vocab_size * shape.d_model) / 989e9  # all but the embedding
    assert found["products"] == pytest.approx(by_hand, rel=0.01)
    in_fp8 = floors(shape, 32_768, 1, gpu, {"products", "products, fp8"})
    assert in_fp8["products"] == pytest.approx(3 * 2 * 32_768 * shape.vocab_size * shape.d_model / 989e9, rel=0.01)


@pytest.mark.parametrize("text", ["10", "3:2", "0:2", "5:101", "a:b"])
def test_steps_to_record_must_be_a_range_of_the_run(text):
    from test_train import config

    with pytest.raises(ValueError, match="--profile-steps"):
        make_plan(config(steps=100, profile_steps=text), vocab_size=500, n_tokens=100_000, world_size=1)


# ---- peers


def test_bamba_of_the_same_shape_has_as_many_parameters_and_both_are_timed(tmp_path, capsys):
    flags = ["--size", "tiny", "--seq-len", "64", "--passes", "1", "--grad-accum", "1", "--kernels", "torch"]
    command = [sys.executable, "-m", "train.bench_peers", *flags, "--json", str(tmp_path / "peers.json")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr[-3000:]
    ours, bamba, mamba = json.loads((tmp_path / "peers.json").read_text())["rows"]
    assert ours["parameters"] == bamba["parameters"] == 56140
    assert min(row[key] for row in (ours, bamba) for key in ("pass_tokens_per_s", "step_tokens_per_s")) > 0
    assert mamba.get("problem", "").startswith("left out: mamba-ssm is not installed") or "parameters" in mamba
    assert f"{ours['step_tokens_per_s'] / bamba['step_tokens_per_s']:.2f}" in result.stdout


def test_size_that_no_peer_has_is_refused(capsys):
    assert peers(["--size", "1.3B-gated"]) == 2
    assert "the output gate of attention" in capsys.readouterr().err


# ---- the first rank of a host goes first


def be_a_rank(rank, hosts, port, folder):
    """A process of the test: works, if it is the first of its host, and then fails to, if it is rank 0."""
    import torch.distributed as dist

    from train.warm_up import first_on_each_host
    from train.watchdog import LostContact

    os.environ["LOCAL_RANK"] = str(hosts[:rank].count(hosts[rank]))
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(hosts))

    def work():
        time.sleep(0.5 * (1 + rank))
        (folder / f"worked{rank}").write_text(str(time.monotonic()))

    def fail():
        if rank == 0:
            raise RuntimeError("no such kernel")

    first_on_each_host(work, "cpu")
    went_on = time.monotonic()
    try:
        first_on_each_host(fail, "cpu")
        said = "nothing"
    except (RuntimeError, LostContact) as error:
        said = f"{type(error).__name__}: {error}"
    (folder / f"rank{rank}").write_text(json.dumps([went_on, said]))
    dist.destroy_process_group()


def test_ranks_wait_for_the_first_of_each_host_and_hear_of_its_failure(tmp_path):
    arguments = (["a", "a", "b"], free_port(), tmp_path)
    multiprocessing.start_processes(be_a_rank, arguments, nprocs=3, start_method="spawn")
    worked = {path.name[-1]: float(path.read_text()) for path in tmp_path.glob("worked*")}
    ranks = {path.name[-1]: json.loads(path.read_text()) for path in tmp_path.glob("rank*")}
    assert set(worked) == {"0", "2"}
    assert all(went_on >= max(worked.values()) for went_on, _ in ranks.values())
    assert ranks["0"][1] == "RuntimeError: no such kernel"
    assert all(ranks[rank][1].startswith("LostContact") for rank in "12")
