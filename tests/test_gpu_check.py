"""`make gpu-check` as far as it can be tried without a GPU: limits of time, verdicts, what it says is missing."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import Step


@pytest.mark.parametrize("with_cupy", [False, True])
def test_steps_take_less_than_nine_minutes(tmp_path, monkeypatch, with_cupy):
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: object() if with_cupy else None)
    found = gpu_check.steps("python", (9, 0), tmp_path)
    assert ("suite on CuPy" in [step.name for step in found]) == with_cupy
    assert sum(step.seconds for step in found) < 540
    assert found[0].environment == {"ASGL_CUDA_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "9.0"}
    for argument in (word for step in found for word in step.command if word.startswith(("--ignore=", "--deselect="))):
        assert (gpu_check.ROOT / argument.split("=")[1].split("::")[0]).exists()


def test_step_is_stopped_with_its_children_and_stops_no_other():
    slow = Step("slow", ["bash", "-c", "echo begun; sleep 60 & sleep 60"], 1, {})
    failing = Step("failing", ["bash", "-c", "echo FAILED one; echo '1 failed, 2 passed in 0.5s'; exit 3"], 5, {})
    silent = Step("silent", ["bash", "-c", "echo 4 skipped in 0.1s"], 5, {}, gpu_check.nothing_passed)
    good = Step("good", ["bash", "-c", "echo $WORD"], 5, {"WORD": "heard"})
    log = io.StringIO()
    started = time.monotonic()
    outcomes = gpu_check.run_all([slow, failing, silent, good], log)
    assert time.monotonic() - started < 30, "the sleeping child was waited for"
    assert [outcome.passed for outcome in outcomes] == [False, False, False, True]
    assert outcomes[0].ended.startswith("stopped after")
    assert [outcome.ended for outcome in outcomes[1:]] == ["failed with status 3", "no test was run", "passed"]
    assert "begun\n" in log.getvalue()
    assert outcomes[3].lines == ["heard"]
    text = gpu_check.summary(outcomes, [])
    assert text.startswith("FAILED one\nfailing: 1 failed, 2 passed in 0.5s\n")
    assert text.endswith("gpu-check: 3 of 4 failed")


def test_verdicts(monkeypatch):
    def seconds(rows):
        return {name: {"forward": f, "backward": b, "both": f + b} for name, (f, b) in rows.items()}

    def measured(steps, power, dtype, **rows):
        return {"steps": steps, "neurons": 2**power, "dtype": dtype, "seconds": seconds(rows)}

    def block(shape, dtype, layout="time first", **rows):
        return {"shape": shape, "dtype": dtype, "layout": layout, "seconds": seconds(rows)}

    ours, cupy = "asgl_cuda cuda", "asgl_cuda cupy"
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: object())
    bars = gpu_check.bars(
        {
            "sizes": [
                measured(
                    4, 24, "float32",
                    **{"multiply": (1, 1.5), ours: (1.1, 1.9), "reference": (20, 30), "torch.compile": (1, 1.9)},
                    **{cupy: (1.12, 2)},
                ),
                measured(128, 19, "bfloat16", **{"multiply": (1, 1.5), ours: (1.25, 1.5), "reference": (10, 20)}),
            ],
            "blocks": [
                block([4, 32, 64, 32, 32], "float32", **{"copy": (1, 1), ours: (2.1, 3), cupy: (2.2, 3)}),
                block([4, 256, 64, 32, 32], "float32", "channels_last", **{"copy": (1, 1), ours: (2.1, 3)}),
                block([4, 256, 64, 32, 32], "bfloat16", **{"copy": (1, 1), ours: (2.1, 3.6)}),
            ],
            "call_microseconds": {ours: 12.0, cupy: 43.0},
        }
    )  # fmt: skip
    verdicts = {bar.what: (bar.measured and round(bar.measured, 3), bar.passed) for bar in bars}
    first, last = "T = 4, N = 2^24, float32: ", "T = 128, N = 2^19, bfloat16: "
    assert verdicts[first + "forward over x * 2"] == (1.1, True)
    assert verdicts[first + "backward over x * g"] == (1.267, False)
    assert verdicts[first + "reference over ours"] == (16.667, True)
    assert verdicts[first + "torch.compile over ours"] == (0.967, False)
    assert verdicts[first + "CuPy over nvcc, forward"] == (1.018, True)
    assert verdicts[first + "CuPy over nvcc, backward"] == (1.053, False)
    assert verdicts[last + "forward over x * 2"] == (1.25, True)
    assert verdicts[last + "reference over ours"] == (10.909, False)
    assert last + "torch.compile over ours" not in verdicts
    assert verdicts["T = 4, N = 2^24, bfloat16: forward over x * 2"] == (None, False)
    # 36 bytes are 2.25 copies of 16.
    assert verdicts["block [4, 32, 64, 32, 32], float32, time first: nvcc over copies"] == (1.133, True)
    assert verdicts["block [4, 32, 64, 32, 32], float32, time first: CuPy over copies"] == (1.156, False)
    assert verdicts["block [4, 256, 64, 32, 32], bfloat16, time first: nvcc over copies"] == (1.267, True)
    assert verdicts["block [4, 256, 64, 32, 32], bfloat16, time first: CuPy over copies"] == (None, False)
    assert verdicts["block [4, 256, 64, 32, 32], float32, channels_last: nvcc over copies"] == (1.133, True)
    assert verdicts["block [4, 256, 64, 32, 32], float32, time first: nvcc over copies"] == (None, False)
    assert verdicts["a call, CuPy over nvcc, microseconds"] == (31.0, False)
    json.dumps(gpu_check.result([], bars, {}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "benchmarks.gpu_check", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=120)
    assert result.returncode == 1
    assert result.stderr.startswith("gpu-check: torch ")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
