"""The time of every kernel of the judged calls, by torch's profiler, and its counters, by Nsight Compute.

The judged calls are the neuron and the block, forward and backward, in every backend of the device. For each kernel:
launches per call, median microseconds, and necessary bytes per second as a fraction of those of a copy in the same run.
On a CPU, operators stand in for kernels, and small sizes for large ones.
"""

from __future__ import annotations

import csv
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from asgl_cuda.layout import CHECKPOINT_STEPS
from benchmarks import ROOT
from benchmarks.common import device_of, in_time, parser_of, write_json
from benchmarks.speed.clocks import Row, Sample, allocated_bytes, clock_of, in_turns, silence
from benchmarks.speed.microbench import rows_of
from benchmarks.speed.sizes import Block, Size, description, samples, sweep

from ..kernels.cuda_code import Kernel

ROUNDS = 10
COPIED_BYTES = {"cuda": 2**30, "cpu": 2**22}  # on a GPU several times its cache
# Elements that a kernel reads and writes for each element of x.
MOVED = {
    "forward": 2, "backward": 3, "forward normalised": 2, "backward normalised": 3, "forward by neuron": 2,
    "backward by neuron": 3, "forward normalised with residual": 3, "backward normalised with residual": 4,
    "moments": 1, "input gradient": 3, "input gradient with residual": 3,
}  # fmt: skip
STATE_BYTES = 4  # of a potential, in the judged types
STAND_INS = {
    "asgl_cuda::lif_forward": "forward",
    "asgl_cuda::lif_backward": "backward",
    "asgl_cuda::batch_norm_update": "moments",
    "asgl_cuda::batch_norm_backward": "input gradient",
    "asgl_cuda::integrator_forward": "integrator forward",
    "asgl_cuda::integrator_backward": "integrator backward",
    "asgl_cuda::recurrent_forward": "recurrent forward",
    "asgl_cuda::recurrent_backward": "recurrent backward",
}
FORBIDDEN = "ERR_NVGPUCTRPERM"  # how Nsight Compute says that only administrators may count
# For Nsight Compute, whether or not it leaves out the namespace.
OUR_KERNELS = "^(asgl::)?(lif|adaptive|integrator|gradient_sum|batch)_"
# Metrics of Nsight Compute, with name and scale of the value in the results.
METRICS = {
    "gpu__time_duration.sum": ("microseconds", 1e-3),
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": ("dram_percent", 1.0),
    "dram__bytes_read.sum": ("bytes_read", 1.0),
    "dram__bytes_write.sum": ("bytes_written", 1.0),
    "sm__inst_issued.avg.pct_of_peak_sustained_active": ("issue_percent", 1.0),
    "sm__warps_active.avg.pct_of_peak_sustained_active": ("occupancy_percent", 1.0),
    "smsp__inst_executed.sum": ("warp_instructions", 1.0),
    "l1tex__t_sector_hit_rate.pct": ("l1_hit_percent", 1.0),
    "lts__t_sector_hit_rate.pct": ("l2_hit_percent", 1.0),
    "smsp__inst_executed_op_local_ld.sum": ("local_loads", 1.0),
    "smsp__inst_executed_op_local_st.sum": ("local_stores", 1.0),
    "launch__shared_mem_config_size": ("shared_bytes_configured", 1.0),
}


def fused_rows(size: Size | Block, device: torch.device) -> Iterator[Row]:
    """The rows of the micro-benchmark for the fused backends of the device."""
    return (row for row in rows_of(size, device) if row.name.startswith("asgl_cuda "))


def copy_bandwidth(device: torch.device) -> float:
    """The bytes per second that a copy reads and writes."""
    x = torch.randint(256, (COPIED_BYTES[device.type],), dtype=torch.uint8, device=device)
    row = Row("copy", lambda sample: sample.grad.copy_(sample.x), lambda sample, out: None)
    clock = clock_of(row, "forward", [Sample(x, x, torch.zeros_like(x))])
    return 2 * x.numel() / in_turns({row.name: clock}, ROUNDS)[row.name].median


def launches(work: Callable[[], object], device: torch.device) -> dict[str, list[float]]:
    """The microseconds of each launch that a function makes, by kernel, in order of the first launches."""
    cuda = device.type == "cuda"
    with silence(), profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiler:
        work()
        if cuda:
            torch.cuda.synchronize()
    wanted = DeviceType.CUDA if cuda else DeviceType.CPU
    found: dict[str, list[float]] = {}
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        on_device = event.device_type() == wanted and not event.is_user_annotation()
        if on_device and (cuda or event.name() in STAND_INS):
            found.setdefault(event.name(), []).append(event.duration_ns() / 1e3)
    if not found:
        raise RuntimeError(f"torch's profiler saw nothing run on {device}")
    return found


def kind_of(name: str) -> tuple[str, str]:
    """The kernel's kind, as in MOVED, and its readable name."""
    kernel = Kernel.from_symbol(name)
    return STAND_INS.get(name, kernel.kind.split(",")[0].removesuffix(" plain")), str(kernel)


def bytes_of(kind: str, size: Size | Block) -> int | None:
    """The bytes that a kernel must move; None if these are not tensors of the layer's size.

    They are sequences, and for neurons a potential at every CHECKPOINT_STEPS-th step but the last.
    """
    if kind not in MOVED:
        return None
    kept = (size.steps - 1) // CHECKPOINT_STEPS if kind.startswith(("forward", "backward")) else 0
    return MOVED[kind] * size.bytes + STATE_BYTES * kept * size.elements // size.steps


def measure(size: Size | Block, device: torch.device, bandwidth: float) -> list[dict[str, Any]]:
    """Measures the kernels of a call. Returns one entry for each backend."""
    torch.manual_seed(0)
    inputs = samples(size, device)
    found = []
    for row in fused_rows(size, device):
        for sample in inputs[:2]:
            row.call("both", sample)
        turns = [inputs[i % len(inputs)] for i in range(max(ROUNDS, len(inputs)))]
        seen = launches(lambda row=row, turns=turns: [row.call("both", sample) for sample in turns], device)
        peak, _ = allocated_bytes(partial(row.call, "both", inputs[0]), device)
        kernels = [entry(name, times, len(turns), size, bandwidth) for name, times in seen.items()]
        about = {"case": str(size), **description(size), "row": row.name, "bytes": size.bytes, "peak_bytes": peak}
        found.append({**about, "kernels": kernels})
    return found


def entry(name: str, times: list[float], rounds: int, size: Size | Block, bandwidth: float) -> dict[str, Any]:
    """The measurements of one kernel."""
    kind, readable = kind_of(name)
    microseconds = statistics.median(times)
    found: dict[str, Any] = {"kernel": readable, "count": len(times) / rounds, "microseconds": microseconds}
    moved = bytes_of(kind, size)
    if moved is not None:
        a_second = moved / microseconds * 1e6
        found |= {"bytes": moved, "gb_a_second": a_second / 1e9, "share_of_copy": a_second / bandwidth}
    return found


def table(measured: dict[str, Any]) -> str:
    """The measurements of one call as text."""
    peak = f", at most {measured['peak_bytes'] / measured['bytes']:.2f} times the bytes of x allocated"
    lines = [
        f"{measured['case']}: {measured['row']}{peak}",
        f"  {'':<64}{'count':>6}{'µs':>10}{'GB/s':>8}{'of copy':>9}",
    ]
    for kernel in measured["kernels"]:
        line = f"  {kernel['kernel'][:64]:<64}{kernel['count']:>6g}{kernel['microseconds']:>10.1f}"
        known = f"{kernel['gb_a_second']:>8.0f}{kernel['share_of_copy']:>9.0%}" if "bytes" in kernel else ""
        lines.append(line + known)
    return "\n".join(lines)


# ---- Nsight Compute ----


def profiled_once(device: torch.device) -> None:
    """Makes each call once to warm up, and once while Nsight Compute profiles."""
    for size in sweep("judged", device):
        sample = samples(size, device)[0]
        for row in fused_rows(size, device):
            row.call("both", sample)
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            row.call("both", sample)
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            print(f"profiled {size}: {row.name}", flush=True)


def ncu_command(ncu: str, log: Path) -> list[str]:
    """The command of Nsight Compute. It leaves the clocks alone, since other processes may use the card."""
    return [
        ncu, "--csv", "--log-file", str(log), "--print-units", "base", "--metrics", ",".join(METRICS),
        "--clock-control", "none", "--profile-from-start", "off", "--target-processes", "all",
        "--kernel-name", f"regex:{OUR_KERNELS}",
        sys.executable, "-m", "tools.gpu_check.kernel_times", "--once",
    ]  # fmt: skip


def counters(lines: Iterable[str]) -> list[dict[str, Any]]:
    """Reads the output of Nsight Compute: messages, then a line for each metric of each launch."""
    rows = csv.DictReader(line for line in lines if line.startswith('"'))
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for row in rows:
        if row["Metric Name"] not in METRICS:
            continue
        name, scale = METRICS[row["Metric Name"]]
        # ncu prints true as (bool)1 and 4 as (int)4.
        symbol = row["Kernel Name"].replace("(bool)1", "true").replace("(bool)0", "false")
        found[row["ID"]]["kernel"] = str(Kernel.from_symbol(re.sub(r"\((?:unsigned )?(?:int|long)\)", "", symbol)))
        value = row["Metric Value"].replace(",", "")
        found[row["ID"]][name] = scale * float(value) if re.fullmatch(r"[\d.]+(e[+-]?\d+)?", value) else None
    return list(found.values())


def counted_by(ncu: str) -> list[dict[str, Any]]:
    """The counters of every launch, in order, as far as they were written before a failure.

    Raises PermissionError if this user may not read counters.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "ncu.csv"
        try:
            status = subprocess.run(ncu_command(ncu, log), cwd=ROOT, check=False).returncode
        except KeyboardInterrupt:
            status = None
        text = log.read_text(errors="replace").splitlines() if log.exists() else []
    for line in text:
        if not line.startswith('"'):
            print(line)
    found = counters(text)
    if not found and any(FORBIDDEN in line for line in text):
        raise PermissionError(f"counters need a permission that this user lacks ({FORBIDDEN})")
    if not found:
        raise SystemExit(f"kernel_times: {ncu} counted nothing, status {status}")
    return found


def main() -> int:
    """Measures all calls and prints a table for each."""
    parser = parser_of("tools.gpu_check.kernel_times", __doc__, "device", "seconds", "json")
    parser.add_argument("--ncu", metavar="PROGRAM", help="count by Nsight Compute, and measure nothing else")
    parser.add_argument("--once", action="store_true", help="the program that Nsight Compute runs")
    arguments = parser.parse_args()
    started = time.monotonic()
    device = device_of(parser, arguments.device)
    if arguments.once:
        profiled_once(device)
        return 0
    if arguments.ncu:
        try:
            found = counted_by(arguments.ncu)
        except PermissionError as error:
            print(error)
            write_json(arguments.json, {"counters": [], "note": str(error)})
            return 0
        print("\n".join(json.dumps(each) for each in found))
        write_json(arguments.json, {"counters": found})
        return 0
    bandwidth = copy_bandwidth(device)
    report: dict[str, Any] = {"card": {"bandwidth": bandwidth}, "calls": []}
    print(f"a copy moves {bandwidth / 1e9:.0f} GB/s")
    for size in in_time(sweep("judged", device), started, arguments.seconds, report):
        for measured in measure(size, device, bandwidth):
            print(table(measured), flush=True)
            report["calls"].append(measured)
        write_json(arguments.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
