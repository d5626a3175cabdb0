"""The check on a GPU as far as it can be tried without one: limits of time, verdicts, its input and its messages."""

import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from asgl_cuda import extension
from asgl_cuda.backends import cupy, neuron_kernels
from asgl_cuda.extension import build_notes
from benchmarks.speed.rates import Rates
from tools.gpu_check import bars as gpu_bars
from tools.gpu_check import card, kernel_times, prepare
from tools.gpu_check import check as gpu_check
from tools.gpu_check import steps as gpu_steps
from tools.gpu_check.check import Findings, Outcome
from tools.gpu_check.steps import Machine, Step

CPU, GPU = torch.device("cpu"), torch.device("cuda")
OF = {"code": "0123", "torch": "2.11.0", "gpu": "a card", "capability": "9.0"}
# The program must not take itself for a worker of the pytest that runs it.
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}


def python(*arguments, **options):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=gpu_check.ROOT, capture_output=True, text=True, timeout=600,
        env=ENVIRONMENT, **options,
    )  # fmt: skip


# ---- steps ----


def test_steps_and_their_order():
    everything = Machine("cuda", ("cuda", "cupy"), "/bin/ncu", sanitizer=True, workers=8)
    found = gpu_steps.steps(everything)
    assert [step.name for step in found] == [
        "extension", "gpu-tests", "kernels", "counters", "judged", "suite-cuda", "suite-cupy", "check", "layers",
        "sweeps", "layers-compiled", "compiled", "sanitizer",
    ]  # fmt: skip
    assert sum(step.seconds for step in found) <= gpu_check.WHOLE
    by_name = {step.name: step for step in found}
    assert by_name["suite-cupy"].command[-2:] == ["-m", "backend and not gpu"]
    assert by_name["suite-cupy"].environment == {"ASGL_TEST_BACKENDS": "cupy"}
    fewer = [step.name for step in gpu_steps.steps(Machine("cuda", ("cuda",)))]
    assert not {"counters", "suite-cupy", "sanitizer"} & set(fewer)


def run_all(todo, whole):
    log, found = io.StringIO(), []
    # gpu_check has a handler of its own. Without one, steps ignore what a shell has its background ignore.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        gpu_check.run_all(todo, whole, log, found.append, {"WORD": "heard"})
    finally:
        signal.signal(signal.SIGINT, before)
    return found, log.getvalue()


def test_step_is_stopped_with_its_children_and_stops_no_other(monkeypatch):
    monkeypatch.setattr(gpu_check, "GRACE", 2)
    deaf = Step("deaf", ["bash", "-c", "trap '' INT; echo begun; sleep 60 & sleep 60"], 1, {})
    failing = Step("failing", ["bash", "-c", "echo FAILED one; echo '1 failed, 2 passed in 0.5s'; exit 3"], 5, {})
    silent = Step("silent", ["bash", "-c", "echo 4 skipped in 0.1s"], 5, {}, gpu_steps.nothing_passed)
    good = Step("good", ["bash", "-c", "echo $WORD"], 5, {})
    started = time.monotonic()
    found, log = run_all([deaf, failing, silent, good], 17)
    assert time.monotonic() - started < 30, "the sleeping child was waited for"
    assert found[0].ended.startswith("stopped after")
    assert [outcome.ended for outcome in found[1:]] == ["failed with status 3", "no test was run", "passed"]
    assert [outcome.passed for outcome in found] == [False, False, False, True]
    assert [outcome.complete for outcome in found] == [False, True, True, True]
    assert (found[1].tests, found[1].failures) == ("1 failed, 2 passed in 0.5s", ["FAILED one"])
    assert "begun\n" in log
    assert log.endswith("heard\n")


WRITES_AND_WAITS = """
import sys, time
file, seconds = sys.argv[1:]
open(file, "w").write('{"seconds": ' + seconds + '}')
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("3 passed in 1.0s")
"""


def test_what_a_stopped_step_has_found_is_kept():
    step = Step("slow", [sys.executable, "-c", WRITES_AND_WAITS, gpu_steps.RESULT, gpu_steps.SECONDS], 4, {})
    (outcome,), _ = run_all([step], 4)
    assert outcome.ended.startswith("stopped after 4 s")
    assert (outcome.tests, outcome.result) == ("3 passed in 1.0s", {"seconds": 3})


@pytest.mark.parametrize("processes", [[], ["-n", "2"]])
def test_what_pytest_said_before_it_was_killed(tmp_path, processes):
    if processes:
        pytest.importorskip("xdist")
    (tmp_path / "test_some.py").write_text(
        "import os, pytest, signal, time\n@pytest.mark.parametrize('word', ['a b', 'c', 'd'])\n"
        "def test_it(word):\n    assert word != 'c'\n"
        "def test_killed():\n    time.sleep(1)\n    os.killpg(0, signal.SIGKILL)\n"
    )
    (pytest_step,) = (step for step in gpu_steps.steps(Machine.here("cpu")) if step.name == "suite-cpu")
    command = [*pytest_step.command[: pytest_step.command.index("-m", 2)], "-p", "no:cacheprovider", *processes]
    (found,), log = run_all([Step("suite", [*command, "-c", os.devnull, "-q", str(tmp_path)], 60, {})], 60)
    assert found.tests == "2 passed, 1 failed, then killed", log
    assert [line for line in found.failures if "FAILED" in line and "test_it[c]" in line] == found.failures
    assert len(found.failures) == 1


def test_interrupted_it_keeps_what_the_step_has_found_and_begins_no_other():
    """Ctrl-C ends it so, or a limit of time from outside."""
    before = signal.signal(signal.SIGTERM, gpu_check.interrupt)
    timer = threading.Timer(3, os.kill, [os.getpid(), signal.SIGTERM])
    try:
        timer.start()
        step = Step("slow", [sys.executable, "-c", WRITES_AND_WAITS, gpu_steps.RESULT, gpu_steps.SECONDS], 50, {})
        (outcome,), _ = run_all([step, Step("next", ["true"], 5, {})], 60)
    finally:
        timer.join()
        signal.signal(signal.SIGTERM, before)
    assert outcome.ended.startswith("interrupted after")
    assert not outcome.complete
    assert (outcome.tests, outcome.result) == ("3 passed in 1.0s", {"seconds": 44})


def test_time_that_is_left_over_is_the_next_ones():
    steps = [Step(name, ["true"], seconds, {}) for name, seconds in (("one", 100), ("two", 30), ("three", 40))]
    _, log = run_all(steps, 200)
    limits = {"one": 130, "two": 160, "three": 200}
    assert log.splitlines() == [f"--- {name}, at most {limit} s: true" for name, limit in limits.items()]
    found, _ = run_all([steps[0]], 0)
    assert found[0].ended == "not run: no time was left"
    assert not found[0].complete


def test_sizes_that_were_not_measured_are_counted():
    line = "not measured for want of time: T = 1, N = 2, float32; T = 3, N = 2, float32"
    assert gpu_steps.not_everything(["first", line]) == "2 sizes were not measured for want of time"
    assert gpu_steps.not_everything(["first"]) is None


# ---- what is there before ----


def test_an_extension_that_is_not_for_this_is_built_anew(tmp_path, monkeypatch, capsys):
    """It is built once: if it does not work then, it is said."""
    built = []
    monkeypatch.setattr(prepare, "build", lambda architecture: built.append(architecture) is None)
    assert prepare.extension_problem("cuda", "1.0").startswith("the extension ")
    monkeypatch.setattr(prepare, "PROBE", "import sys; sys.exit('it is not')")
    assert prepare.ready("cuda", "1.0") == "it is not"
    assert built == ["1.0"]
    assert capsys.readouterr().out == "it is not; it is built anew\n"
    monkeypatch.setattr(prepare, "PROBE", "")
    assert prepare.ready("cuda", "1.0") is None


def test_extension_is_built_without_setup(tmp_path, monkeypatch):
    """A setuptools that can't read pyproject.toml does."""
    commands = []

    def run(command, env, **_):
        commands.append((*command, env["ASGL_CUDA_BUILD"], env["TORCH_CUDA_ARCH_LIST"]))
        built = pathlib.Path(command[-1]) / "asgl_cuda"
        built.mkdir(parents=True)
        for name in (build_notes.EXTENSION, build_notes.NOTES):
            (built / name).write_text("built")
        return subprocess.CompletedProcess(command, 0)

    package = tmp_path / "package"
    package.mkdir()
    (package / build_notes.EXTENSION).write_text("of before")
    monkeypatch.setattr(prepare, "COMPILED", tmp_path / "compiled")
    monkeypatch.setattr(extension, "PACKAGE", package)
    monkeypatch.setattr(prepare.subprocess, "run", run)
    assert prepare.build("9.0")
    sources = gpu_check.ROOT / "csrc"
    assert commands == [
        (
            sys.executable,
            "-m",
            "asgl_cuda.extension.compilation",
            str(sources),
            str(tmp_path / "compiled"),
            "cuda",
            "9.0",
        )
    ]
    assert {path.name: path.read_text() for path in package.iterdir()} == {
        build_notes.EXTENSION: "built", build_notes.NOTES: "built",
    }  # fmt: skip


def test_missing_setuptools_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(prepare.subprocess, "run", None)
    assert not prepare.build("9.0")
    assert capsys.readouterr().out == f"compiling takes setuptools, which {sys.executable} does not have\n"


def test_cache_is_filled_for_a_gpu_that_is_not_there(tmp_path, monkeypatch):
    pytest.importorskip("cupy")
    import tools.kernels.cuda_compile

    kernels = [cupy.PROBE, neuron_kernels.gradient_sum_kernel(torch.float64)]
    monkeypatch.setattr(tools.kernels.cuda_compile, "kernels_asked_for", lambda: kernels)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    assert prepare.fill_cache("9.0", 2) == 2
    assert len(list(tmp_path.glob("asgl_cuda_*.cubin"))) == 2
    monkeypatch.setattr(cupy, "compile_kernels", None)
    assert cupy.load_or_compile(kernels[1], "sm_90").image


# ---- what is found ----


def outcome(name, passed=True, complete=True, **result):
    return Outcome(name, passed, "passed" if passed else "stopped", complete, 1.0, None, [], result)


def test_a_second_run_goes_on_where_the_first_was_killed(tmp_path):
    first = Findings(tmp_path / "gpu_check.json", OF)
    for each in (outcome("extension"), outcome("gpu-tests", passed=False), outcome("kernels", False, complete=False)):
        first.note(each)  # writes the file; no more of this run is needed
    second = Findings(tmp_path / "gpu_check.json", OF)
    assert second.read() is None
    assert [second.is_done(name) for name in ("extension", "gpu-tests", "kernels", "judged")] == [
        False, True, False, False,
    ]  # fmt: skip
    second.note(outcome("kernels", machine={"gpu": "a card"}))
    assert second.about == {"gpu": "a card"}
    assert second.failed() == ["gpu-tests"]
    assert second.summary().endswith("gpu-check: 1 of 3 failed")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "was not written by this program"),
        ("{}", "was not written by this program"),
        (json.dumps({"steps": {}, "machine": {}, "of": {**OF, "code": "9999"}}), "is of code 9999, and this is 0123"),
        (
            json.dumps({"steps": {}, "machine": {}, "of": {**OF, "gpu": "another"}}),
            "is of gpu another, and this is a card",
        ),
    ],
)
def test_results_of_something_else_are_refused(tmp_path, monkeypatch, capsys, content, words):
    file = tmp_path / "gpu_check.json"
    file.write_text(content)
    monkeypatch.setattr(gpu_check, "of_here", lambda dry_run: OF)
    monkeypatch.setattr(sys, "argv", ["gpu_check", str(tmp_path), "--dry-run"])
    assert gpu_check.main() == 1
    message = capsys.readouterr().err
    assert message.startswith(f"gpu-check: {file} {words}")
    assert message.endswith("--again\n")
    assert message.count("\n") == 1
    assert file.read_text() == content


def test_a_place_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["gpu_check", str(tmp_path / "file" / "out"), "--dry-run"])
    assert gpu_check.main() == 1
    assert capsys.readouterr().err == f"gpu-check: {tmp_path}/file/out can't be written: Not a directory\n"


@pytest.mark.parametrize(("of", "left"), [(OF, ["kernels", "check"]), ({**OF, "code": "9999"}, ["check"])])
def test_again_replaces_what_it_runs_alone_if_the_code_is_the_same(tmp_path, monkeypatch, capsys, of, left):
    before = Findings(tmp_path / "gpu_check.json", of)
    before.note(outcome("kernels"))
    before.note(outcome("check", passed=False))
    monkeypatch.setattr(gpu_check, "of_here", lambda dry_run: OF)
    monkeypatch.setattr(gpu_check, "steps", lambda machine: [Step("check", ["true"], 5, {})])
    monkeypatch.setattr(sys, "argv", ["gpu_check", str(tmp_path), "--dry-run", "--only", "check", "--again"])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert gpu_check.main() == 0
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    after = Findings(tmp_path / "gpu_check.json", OF)
    assert after.read() is None
    assert list(after.outcomes) == left
    assert after.outcomes["check"].passed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    result = python("-m", "tools.gpu_check.check", tmp_path / "out")
    assert result.returncode == 1
    assert result.stderr.startswith("gpu-check: torch ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_dry_run(tmp_path):
    """The program itself, with all of its steps except those that have torch.compile compile for minutes."""
    wanted = [step.name for step in gpu_steps.steps(Machine.here("cpu")) if "compiled" not in step.name]
    result = python("-m", "tools.gpu_check.check", tmp_path, "--dry-run", "--only", *wanted)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    assert result.stdout.endswith("gpu-check: all passed\n")
    assert (tmp_path / "log.txt").read_text() in result.stdout
    found = json.loads((tmp_path / "gpu_check.json").read_text())
    assert list(found["steps"]) == wanted
    assert found["machine"]["torch"] == torch.__version__
    results = {name: step["result"] for name, step in found["steps"].items()}
    assert {kernel["kernel"] for call in results["kernels"]["calls"] for kernel in call["kernels"]} == set(
        kernel_times.STAND_INS
    )
    assert results["layers"]["layers"][0]["launches"] == 2
    assert any(bar["measured"] and bar["predicted"] for bar in found["bars"])
    again = python("-m", "tools.gpu_check.check", tmp_path, "--dry-run", "--only", "judged")
    assert "---" not in again.stdout, "it was done"


# ---- bars ----


def test_verdicts(monkeypatch):
    def seconds(rows):
        return {name: {"forward": f, "backward": b, "both": f + b} for name, (f, b) in rows.items()}

    def measured(steps, power, dtype, **rows):
        place = {"layout": "time first", "learned": "width"}
        return {"steps": steps, "neurons": 2**power, "dtype": dtype, **place, "seconds": seconds(rows)}

    def block(shape, dtype, layout="time first", **rows):
        return {"shape": shape, "dtype": dtype, "layout": layout, "seconds": seconds(rows)}

    ours, cupy = "asgl_cuda cuda", "asgl_cuda cupy"
    monkeypatch.setattr(gpu_bars.importlib.util, "find_spec", lambda name: object())
    judged = {
        "card": {"bandwidth": 3.35e12, "cycles": 132 * 1.755e9},
        "sizes": [
            measured(
                4, 24, "float32",
                **{"multiply": (1, 1.5), ours: (1.1, 1.9), "reference": (20, 30), cupy: (1.12, 2)},
            ),
            measured(128, 19, "bfloat16", **{"multiply": (1, 1.5), ours: (1.35, 1.7), "reference": (10, 20)}),
        ],
        "blocks": [
            block([4, 32, 64, 32, 32], "float32", **{"copy": (1, 1), ours: (2.1, 3), cupy: (2.2, 3)}),
            block([4, 256, 64, 32, 32], "float32", "channels_last", **{"copy": (1, 1), ours: (2.1, 3)}),
            block([4, 256, 64, 32, 32], "bfloat16", **{"copy": (1, 1), ours: (2.1, 4.2)}),
        ],
        "call_microseconds": {ours: 12.0, cupy: 43.0},
    }  # fmt: skip
    compiled = {"sizes": [measured(4, 24, "float32", **{ours: (1.1, 1.9), "torch.compile": (1, 1.9)})]}
    bars = gpu_bars.bars(GPU, judged, compiled, 90)
    verdicts = {bar.what: (bar.measured and round(bar.measured, 3), bar.passed) for bar in bars}
    first, last = "T = 4, N = 16777216, float32: ", "T = 128, N = 524288, bfloat16: "
    assert verdicts[first + "forward over x * 2"] == (1.1, True)
    assert verdicts[first + "backward over x * g"] == (1.267, False)
    assert verdicts[first + "reference over ours"] == (16.667, True)
    assert verdicts[first + "torch.compile over ours"] == (0.967, False)
    assert verdicts[first + "CuPy over nvcc, forward"] == (1.018, True)
    assert verdicts[first + "CuPy over nvcc, backward"] == (1.053, False)
    assert verdicts[last + "forward over x * 2"] == (1.35, False)
    assert verdicts[last + "backward over x * g"] == (1.133, True)
    assert verdicts[last + "reference over ours"] == (9.836, False)
    assert last + "torch.compile over ours" not in verdicts
    assert verdicts["T = 4, N = 16777216, bfloat16: forward over x * 2"] == (None, False)
    # 36 bytes are 2.25 copies of 16.
    assert verdicts["block [4, 32, 64, 32, 32], float32: nvcc over copies"] == (1.133, True)
    assert verdicts["block [4, 32, 64, 32, 32], float32: CuPy over copies"] == (1.156, False)
    assert verdicts["block [4, 256, 64, 32, 32], bfloat16: nvcc over copies"] == (1.4, False)
    assert verdicts["block [4, 256, 64, 32, 32], bfloat16: CuPy over copies"] == (None, False)
    assert verdicts["block [4, 256, 64, 32, 32], float32, channels_last: nvcc over copies"] == (1.133, True)
    assert verdicts["block [4, 256, 64, 32, 32], float32: nvcc over copies"] == (None, False)
    assert verdicts["a call, CuPy over nvcc, microseconds"] == (31.0, False)
    json.dumps([bar._asdict() for bar in bars])


def test_bars_are_those_of_the_card():
    """In float32 memory binds everywhere; in bfloat16 an H200 moves more bytes than it can start instructions for."""
    cycles = 132 * 1.755e9

    def predicted(kernel, dtype, bandwidth, architecture=90):
        roof = gpu_bars.Roof(card.roofline(architecture), Rates(bandwidth, cycles))
        return round(roof.prediction((kernel,), dtype, 4), 2)

    for kernel, h100, h200 in (("forward", 1.0, 1.3), ("backward", 1.0, 1.39)):
        assert predicted(kernel, "float32", 3.35e12) == predicted(kernel, "float32", 4.8e12) == 1
        assert predicted(kernel, "bfloat16", 3.35e12) == pytest.approx(h100, abs=0.011)
        assert predicted(kernel, "bfloat16", 4.8e12) == pytest.approx(h200, abs=0.011)
        assert predicted(kernel, "bfloat16", 4.8e12, architecture=120) == 1, "the page has no such card"
    assert gpu_bars.Roof(card.roofline(90), None).prediction(("forward",), "float32", 4) is None


# ---- kernels ----

SYMBOL = (
    "void asgl::lif_forward_kernel<float, asgl::LIF<(asgl::Surrogate)0, {}>, {}, "
    "(asgl::Input)2, {}>(asgl::ForwardParams<{}>)"
)


def test_kernels_have_the_names_that_the_page_has():
    assert kernel_times.kind_of(SYMBOL.format("true", "4", "0", "float"))[0] == "forward"
    works = card.roofline(90)
    entry = kernel_times.entry(
        SYMBOL.format("true", "4", "0", "float"), [200.0, 190.0, 210.0, 200.0], 2,
        gpu_bars.Size(4, 2**24, "float32"), Rates(3.35e12, 132 * 1.755e9), works,
    )  # fmt: skip
    assert (entry["count"], entry["microseconds"], entry["bytes"]) == (2, 200, 8 * 2**26)
    assert entry["share_of_copy"] == pytest.approx(8 * 2**26 / 200e-6 / 3.35e12)
    assert entry["predicted_microseconds"] == pytest.approx(160.3, abs=0.1)
    unknown = kernel_times.entry("Memset (Device)", [2.0], 1, gpu_bars.Size(4, 2**24, "float32"), None, works)
    assert unknown == {"kernel": "Memset (Device)", "count": 1, "microseconds": 2}


NCU = """#!/bin/sh
test "$1 $2" = "--csv --log-file" || exit 2
cat > "$3" <<'END'
==PROF== Connected to process 123
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","123","{symbol}","gpu__time_duration.sum","ns","201,500"
"0","123","{symbol}","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","91.25"
"0","123","{symbol}","smsp__inst_executed.sum","inst","n/a"
END
"""


def test_counters_of_nsight_compute(tmp_path, capfd):
    program = tmp_path / "ncu"
    program.write_text(NCU.format(symbol=SYMBOL.format("(bool)1", "(int)4", "(int)0", "T1")))
    program.chmod(0o755)
    name = "forward plain, 4 neurons, float32, rectangle, hard"
    assert kernel_times.counted_by(str(program)) == [
        {"kernel": name, "microseconds": 201.5, "dram_percent": 91.25, "warp_instructions": None}
    ]
    assert "==PROF== Connected" in capfd.readouterr().out
    program.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(SystemExit, match="counted nothing, status 1"):
        kernel_times.counted_by(str(program))


# ---- the suite of a device ----

OPTIONAL = (
    "aeon", "cupy", "cupy_backends", "h5py", "hypothesis", "librosa", "matplotlib", "nir", "nirtorch", "norse", "rich",
    "sinabs", "sklearn", "snntorch", "soundfile", "spikingjelly", "tonic", "torchvision",
)  # fmt: skip


def test_everything_is_collected_with_torch_and_pytest_alone(tmp_path):
    """All is collected, and a few tests pass of the suite that runs on a device, which its marker chooses."""
    (tmp_path / "hidden.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({OPTIONAL}))\n")
    environment = {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(gpu_check.ROOT))), "ASGL_TEST_BACKENDS": "cpu"}
    command = ["-m", "pytest", "-p", "no:hypothesispytest", "-p", "hidden", "-m", "backend and not gpu"]
    found = subprocess.run(
        [sys.executable, *command, "-k", "none_and_all or time_elsewhere or storage"], cwd=gpu_check.ROOT,
        capture_output=True, text=True, timeout=600, env={**ENVIRONMENT, **environment},
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-3000:]
    assert gpu_steps.nothing_passed(found.stdout.splitlines()) is None
