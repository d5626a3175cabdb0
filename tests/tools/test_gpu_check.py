"""The check on a GPU, without a GPU: time limits, verdicts, input and reports."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from asgl_cuda.backends import extension, launcher
from asgl_cuda.backends.extension import build_notes
from benchmarks.speed.sizes import Block, Size, description
from tools.gpu_check import bars, check, kernel_times, layers, prepare, small_calls, steps
from tools.gpu_check.check import Findings, Outcome
from tools.gpu_check.steps import Machine, Step

ORIGIN = {"code": "0123", "torch": "2.11.0", "gpu": "a card", "capability": "9.0"}
# Without the variables that mark a worker of this pytest.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


def python(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=check.ROOT, capture_output=True, text=True, timeout=600,
        env={**ENVIRONMENT, **environment},
    )  # fmt: skip


@pytest.fixture
def main(monkeypatch):
    """The program, called in this process; its signal handlers go."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["check", *map(str, arguments)])
        return check.main()

    yield call
    for number, handler in handlers.items():
        signal.signal(number, handler)


# ---- steps ----


def test_steps_fit_into_the_time():
    build, *found = steps.steps(Machine("cuda", ("cuda", "cupy"), "/bin/ncu", sanitizer=True, workers=8))
    assert build.name == steps.BUILD
    assert sum(step.seconds for step in found) <= check.WHOLE


@pytest.mark.parametrize("ends", [True, False])
def test_the_build_takes_no_time_from_the_steps(main, monkeypatch, tmp_path, ends):
    ran = []

    def run_all(todo, whole, log, note, variables):
        ran.append(([step.name for step in todo], whole))
        return ends

    monkeypatch.setattr(check, "run_all", run_all)
    main(tmp_path, "--dry-run", "--only", steps.BUILD, "check", "layers")
    assert ran == [(["extension"], steps.BUILD_SECONDS), (["check", "layers"], 10 * check.WHOLE)][: 1 + ends]


def bash(name, text, seconds=60.0, *words, **options):
    return Step(name, ["bash", "-c", text, "bash", *words], seconds, {}, **options)


def test_stopped_and_failing_steps(monkeypatch):
    """A step is interrupted at its limit, then killed; what it wrote before is kept."""
    monkeypatch.setattr(check, "GRACE", 1)
    deaf = bash("deaf", "trap '' INT; echo begun; (sleep 60; echo waited) & sleep 60; echo waited", 2)
    writes = 'trap "echo 3 passed in 1.0s; exit 0" INT; echo "{\\"seconds\\": $2}" > $1; while true; do sleep 1; done'
    slow = bash("slow", writes, 4, steps.RESULT, steps.SECONDS)
    failing = bash("failing", "echo FAILED one; echo '1 failed, 2 passed in 0.5s'; exit 3")
    silent = bash("silent", "echo 4 skipped in 0.1s", objection=steps.nothing_passed)
    log, found = io.StringIO(), []
    # As the program's handler: steps must not inherit an ignored SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        todo = [deaf, slow, failing, silent, bash("good", "echo $WORD")]
        check.run_all(todo, 186, log, found.append, {"WORD": "heard"})
    finally:
        signal.signal(signal.SIGINT, before)
    assert "waited" not in log.getvalue().splitlines()
    assert all(outcome.ended.startswith("stopped after ") for outcome in found[:2])
    assert [outcome.ended for outcome in found[2:]] == ["failed with status 3", "no test was run", "passed"]
    assert [outcome.passed for outcome in found] == [False, False, False, False, True]
    assert [outcome.complete for outcome in found] == [False, False, True, True, True]
    assert found[1].tests == "3 passed in 1.0s"
    assert 0 < found[1].result["seconds"] < 4
    assert (found[2].tests, found[2].failures) == ("1 failed, 2 passed in 0.5s", ["FAILED one"])
    assert "begun\n" in log.getvalue()
    assert log.getvalue().endswith("heard\n")


def test_extension_is_built_once(monkeypatch, capsys):
    built = []
    monkeypatch.setattr(prepare, "build", lambda architecture: built.append(architecture) is None)
    assert prepare.extension_problem("cuda", "1.0").startswith("the extension ")
    monkeypatch.setattr(prepare, "PROBE", "import sys; sys.exit('it is not')")
    assert prepare.ready("cuda", "1.0") == "it is not"
    assert built == ["1.0"]
    assert capsys.readouterr().out == "it is not; building it\n"


@pytest.mark.parametrize(
    ("cuda", "architecture", "words"),
    [
        ("CUDA 13.0, sm_80 sm_86", "8.9", None),
        ("CUDA 13.0, sm_90", "9.0", None),
        ("CUDA 13.0, sm_80 sm_86 and PTX of compute_80", "9.0", "has no cubin for 9.0"),
        ("CUDA 13.0, sm_89", "8.6", "has no cubin for 8.6"),
        (None, "9.0", "was built without CUDA"),
    ],
)
def test_architectures_that_serve_the_gpu(monkeypatch, cuda, architecture, words):
    """An sm_86 serves a GPU of 8.9; PTX would be compiled while the steps are timed."""
    monkeypatch.setattr(extension, "build_info", build_notes.BuildInfo("2.13", cuda, "a reason", "0123", 1, 1))
    monkeypatch.setattr(extension, "module", object())
    monkeypatch.setattr(sys, "argv", ["-c", "cuda", architecture])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if words is None:
        exec(prepare.PROBE, {})
        return
    with pytest.raises(SystemExit, match=words):
        exec(prepare.PROBE, {})


# ---- findings ----


def outcome(name, passed=True, complete=True, **result):
    return Outcome(name, passed, "passed" if passed else "stopped", complete, 1.0, None, [], result)


def test_second_run_continues_a_killed_one(tmp_path):
    first = Findings(tmp_path / "gpu_check.json", ORIGIN)
    for each in (outcome("extension"), outcome("gpu-tests", passed=False), outcome("kernels", False, complete=False)):
        first.note(each)  # writes the file
    second = Findings(tmp_path / "gpu_check.json", ORIGIN)
    assert second.read() is None
    done = [second.is_done(name) for name in ("extension", "gpu-tests", "kernels", "judged")]
    assert done == [False, True, False, False]
    second.note(outcome("kernels", machine={"gpu": "a card"}))
    assert second.about == {"gpu": "a card"}
    second.note(outcome("counters", note="nobody may count"))
    assert second.failed() == ["gpu-tests"]
    assert "passed; nobody may count\n" in second.summary()
    assert second.summary().endswith("gpu-check: 1 of 4 failed")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "was not written by this program"),
        (json.dumps({"steps": {}, "machine": {}, "origin": {**ORIGIN, "gpu": "another"}}),
         "is of gpu another, and this is a card"),
    ],
)  # fmt: skip
def test_other_results_are_refused(main, tmp_path, monkeypatch, capsys, content, words):
    file = tmp_path / "gpu_check.json"
    file.write_text(content)
    monkeypatch.setattr(check, "origin", lambda dry_run: ORIGIN)
    assert main(tmp_path, "--dry-run") == 1
    message = capsys.readouterr().err
    assert message.startswith(f"gpu-check: {file} {words}")
    assert message.endswith("--again\n")
    assert file.read_text() == content


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_error_without_a_gpu(main, tmp_path, capsys):
    assert main(tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert message.startswith("gpu-check: torch ")
    assert message.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_dry_run(tmp_path):
    """All steps except those with torch.compile, which takes minutes."""
    wanted = [step.name for step in steps.steps(Machine.here("cpu")) if "compiled" not in step.name]
    result = python("-m", "tools.gpu_check.check", tmp_path, "--dry-run", "--only", *wanted)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    assert result.stdout.endswith("gpu-check: all passed\n")
    assert (tmp_path / "log.txt").read_text() in result.stdout
    assert "missed" not in result.stdout
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert list(found["steps"]) == wanted
    assert found["machine"]["torch"] == torch.__version__
    results = {name: step["result"] for name, step in found["steps"].items()}
    assert results["judged"]["call_microseconds"]["launched in Python"] > 0
    kernels = [kernel for call in results["kernels"]["calls"] for kernel in call["kernels"]]
    launched_by_layers = {name for layer in results["layers"]["layers"] for name in layer["launched"]}
    assert {kernel["kernel"] for kernel in kernels} < launched_by_layers == set(kernel_times.STAND_INS)
    assert all(kernel["share_of_copy"] > 0 for kernel in kernels)
    assert results["layers"]["layers"][0]["launches"] == 2
    assert all(each["peak_bytes"] > 0 for each in (*results["layers"]["layers"], *results["kernels"]["calls"]))
    assert found["bars"] == []


def test_calls_for_the_sanitizer(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["small_calls", "--device", "cpu", "--backend", "cpu"])
    assert small_calls.main() == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert last == "done"
    assert len(lines) == 5 * len({line.partition(":")[0] for line in lines}), "each call with each input"
    assert not re.search(r"\b(nan|inf)\b", "\n".join(lines))


def test_layers_of_every_kind(monkeypatch, capsys, tmp_path):
    """Their time, launches and peaks, on the CPU."""
    result = tmp_path / "result.json"
    monkeypatch.setattr(sys, "argv", ["layers", "--device", "cpu", "--json", str(result)])
    monkeypatch.setattr(layers, "CALLS", {"cpu": 1})
    monkeypatch.setattr(layers, "REPEATS", 1)
    monkeypatch.setattr(layers, "fused_backends", lambda device: ["cpu"])  # without the emulated one
    assert layers.main() == 0
    found = {each["layer"]: each for each in json.loads(result.read_text())["layers"]}
    assert {"AdaptiveLIF", "LIF, levels", "RecurrentLIF", "RecurrentLIF, synapse and adaptation"} < set(found)
    assert found["RecurrentLIF"]["launched"] == {f"asgl_cuda::recurrent_{part}": 1 for part in ("forward", "backward")}
    for each in found.values():
        assert each["peak_bytes"] >= 2 * 4 * torch.Size(each["shape"]).numel(), "spikes and the input's gradient"


# ---- kernels ----


def test_every_kernel_is_named_and_counted():
    """By torch's profiler and by Nsight Compute, with and without the namespace."""
    names = launcher.kernel_names()
    assert len(set(names)) == len(names) == 922
    for kernel in names:
        assert re.search(kernel_times.OUR_KERNELS, kernel)
        assert re.search(kernel_times.OUR_KERNELS, kernel.removeprefix("asgl::"))
        assert "<" not in kernel_times.kind_of(f"void {kernel}(asgl::Params)")[1], "unknown to kind_of of cuda_code.py"
    command = kernel_times.ncu_command("ncu", Path("log"))
    assert command[command.index("--kernel-name") + 1] == f"regex:{kernel_times.OUR_KERNELS}"


FORBIDDEN = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters"


@pytest.mark.parametrize(
    ("said", "status"), [(FORBIDDEN, 0), ("==ERROR== Failed to prepare kernel for profiling", "counted nothing")]
)
def test_missing_counters(monkeypatch, tmp_path, said, status):
    """Without the permission to count, a note; else a failure."""
    result, ncu = tmp_path / "result.json", tmp_path / "ncu"
    ncu.write_text(f"#!/bin/sh\necho '{said}' > $3\nexit 1\n")
    ncu.chmod(0o755)
    monkeypatch.setattr(sys, "argv", ["kernel_times", "--device", "cpu", "--ncu", str(ncu), "--json", str(result)])
    if status:
        with pytest.raises(SystemExit, match=status):
            kernel_times.main()
        assert not result.exists()
        return
    assert kernel_times.main() == 0
    assert "ERR_NVGPUCTRPERM" in json.loads(result.read_text())["note"]


def test_share_of_a_copy():
    """By the bytes of sequences and potentials: 4.22 an element forward in bfloat16 for 128 steps."""
    size, block = Size(128, 1024, "bfloat16"), Block((4, 2, 8, 8, 8), "float32", residual=True)
    kinds = ("forward", "backward", "forward normalised", "moments", "gradient sum")
    expected = [round(size.elements * each) for each in (4 + 4 * 7 / 128, 6 + 4 * 7 / 128, 4 + 4 * 7 / 128, 2)]
    assert [kernel_times.bytes_of(kind, size) for kind in kinds] == [*expected, None]
    added = ("moments", *(f"{each} with residual" for each in ("forward normalised", "backward normalised",
                                                                "input gradient")))  # fmt: skip
    assert sum(kernel_times.bytes_of(kind, block) for kind in added) == 44 * block.elements
    assert sum(kernel_times.MOVED[kind.removesuffix(" with residual")] for kind in added) == 9
    kernel = "void asgl::batch_moments_kernel<float, 4>(asgl::MomentsParams<float>)"
    found = kernel_times.entry(kernel, [3.0, 1.0, 2.0], 3, block, bandwidth=4e9)
    assert found == {
        "kernel": "moments, 4 columns, float32", "count": 1, "microseconds": 2.0, "bytes": 16384, "gb_a_second": 8.192,
        "share_of_copy": 2.048,
    }  # fmt: skip
    measured = {"case": "a block", "row": "ours", "bytes": 4096, "peak_bytes": 10240, "kernels": [found]}
    assert "205%" in kernel_times.table(measured)
    assert "2.50 times" in kernel_times.table(measured)


# ---- bars ----

OURS, THEIRS = bars.OURS, bars.CUPY_KERNELS
# Seconds forward and backward by row; and verdicts on them. 36 bytes are 2.25 copies of 16, 44 with a residual 2.75.
JUDGED = {
    Size(4, 2**24, "float32"): {"multiply": (1, 1.5), OURS: (1.1, 1.9), "reference": (20, 30), THEIRS: (1.12, 2)},
    Size(128, 2**19, "bfloat16"): {"multiply": (1, 1.5), OURS: (1.35, 1.7), "reference": (10, 20)},
    Block((4, 32, 64, 32, 32), "float32"): {"copy": (1, 1), OURS: (2.1, 3), THEIRS: (2.2, 3)},
    Block((4, 256, 64, 32, 32), "bfloat16"): {"copy": (1, 1), OURS: (2.1, 4.2)},
    Block((4, 256, 64, 32, 32), "float32", residual=True): {"copy": (1, 1), OURS: (2.3, 3.2)},
}
FIRST, LAST = "T = 4, N = 16777216, float32: ", "T = 128, N = 524288, bfloat16: "
VERDICTS = {
    f"{FIRST}forward over x * 2": (1.1, True),
    f"{FIRST}backward over x * g": (1.267, False),
    f"{FIRST}reference over ours": (16.667, True),
    f"{FIRST}torch.compile over ours": (0.967, False),
    f"{FIRST}CuPy over nvcc, forward": (1.018, True),
    f"{FIRST}CuPy over nvcc, backward": (1.053, False),
    f"{LAST}forward over x * 2": (1.35, False),
    f"{LAST}backward over x * g": (1.133, True),
    f"{LAST}reference over ours": (9.836, False),
    "block [4, 32, 64, 32, 32], float32: nvcc over copies": (1.133, True),
    "block [4, 32, 64, 32, 32], float32: CuPy over copies": (1.156, False),
    "block [4, 256, 64, 32, 32], bfloat16: nvcc over copies": (1.4, False),
    "block [4, 256, 64, 32, 32], bfloat16: CuPy over copies": (None, False),
    "block [4, 256, 64, 32, 32], float32, residual: nvcc over copies": (1.0, True),
    "a call: CuPy over its launchers": (1.55, False),
}


def seconds(rows):
    return {name: {"forward": f, "backward": b, "both": f + b} for name, (f, b) in rows.items()}


def test_verdicts(monkeypatch):
    monkeypatch.setattr(bars.importlib.util, "find_spec", lambda name: object())
    of = {kind: [size for size in JUDGED if isinstance(size, kind)] for kind in (Size, Block)}
    sizes, blocks = (
        [{**description(each), "seconds": seconds(JUDGED[each])} for each in those] for those in of.values()
    )
    calls = {OURS: 12.0, THEIRS: 93.0, "launched in Python": 60.0}
    judged = {"sizes": sizes, "blocks": blocks, "call_microseconds": calls}
    compiled = {"sizes": [{**sizes[0], "seconds": seconds({OURS: (1.1, 1.9), "torch.compile": (1, 1.9)})}]}
    found = bars.bars(judged, compiled)
    verdicts = {bar.what: (bar.measured and round(bar.measured, 3), bar.passed) for bar in found}
    assert VERDICTS.items() <= verdicts.items()
    assert f"{LAST}torch.compile over ours" not in verdicts
    json.dumps([bar._asdict() for bar in found])


# ---- the suite of a device ----

OPTIONAL = (
    "aeon", "cupy", "cupy_backends", "h5py", "hypothesis", "librosa", "matplotlib", "nir", "nirtorch", "norse", "rich",
    "sinabs", "sklearn", "snntorch", "soundfile", "spikingjelly", "tonic", "torchvision",
)  # fmt: skip


def test_suite_needs_torch_and_pytest_alone(tmp_path):
    """Collection of the suite of a device, and a few of its tests."""
    (tmp_path / "hidden.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({OPTIONAL}))\n")
    found = python(
        "-m", "pytest", "-p", "no:hypothesispytest", "-p", "hidden", "-m", "backend and not gpu", "-k",
        "none_and_all or time_elsewhere or storage", ASGL_TEST_BACKENDS="cpu",
        PYTHONPATH=os.pathsep.join((str(tmp_path), str(check.ROOT))),
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-3000:]
    assert steps.nothing_passed(found.stdout.splitlines()) is None
