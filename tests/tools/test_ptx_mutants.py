"""Mutants that only a compiler for GPUs sees: under __CUDA_ARCH__, in its layouts.

The emulation runs none of that code. On the PTX each mutant changes bits or raises an error.
"""

import shutil
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

import asgl_cuda
from asgl_cuda import backends
from asgl_cuda.backends import cupy
from tools import ptx
from tools.emulation import emulated
from tools.ptx.to_cpp import UnknownPTXError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ptx,
    pytest.mark.skipif(ptx.missing() is not None, reason=str(ptx.missing())),
]


def forward(backend: str, dtype: torch.dtype, **options) -> list[torch.Tensor]:
    """Smooth values, which show every rounding; one input is NaN."""
    x_seq = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    x_seq[2, 5] = torch.nan
    return [asgl_cuda.lif(x_seq, **{"analog_prob": 1.0, **options}, backend=backend)]


def backward(backend: str) -> list[torch.Tensor]:
    """With noise over more than four steps, for which its key is opaque to the optimiser."""
    x_seq = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    s_seq = asgl_cuda.lif(x_seq, width=2.0, **NOISE, backend=backend)
    (s_seq * torch.arange(1.0, 6.0)[:, None]).sum().backward()
    return [s_seq.detach(), x_seq.grad]


def adaptive(backend: str) -> list[torch.Tensor]:
    """With w in the threshold and in a soft reset."""
    x_seq = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    s_seq = asgl_cuda.adaptive_lif(
        x_seq, adapt_decay=0.9, adapt_spike=0.3, to_threshold=True, v_reset=None, **NOISE, backend=backend
    )
    (s_seq * torch.arange(1.0, 6.0)[:, None]).sum().backward()
    return [s_seq.detach(), x_seq.grad]


NOISE = {"analog_prob": 0.5, "rng_state": torch.tensor([1234567890123, 42])}
CALLS = {
    "float": partial(forward, dtype=torch.float32),
    "half": partial(forward, dtype=torch.float16),
    "bfloat": partial(forward, dtype=torch.bfloat16),
    "noisy": partial(forward, dtype=torch.float32, **NOISE),
    "fast sigmoid": partial(forward, dtype=torch.float32, surrogate="fast_sigmoid"),
    "backward": backward,
    "adaptive": adaptive,
}


class Mutant(NamedTuple):
    """A replacement in a file of csrc, and the call that shows it: by other values, or by an error."""

    call: str
    file: str
    old: str
    new: str
    error: str = ""


PACK = '"=r"(word) : "f"(second), "f"(first)'
SWAPPED = '"=r"(word) : "f"(first), "f"(second)'
STORE = '"st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to)'
OPAQUE = 'asm volatile("" : "+r"(key_.seed_low), "+r"(key_.seed_high));'
NOWHERE = "is in none of the buffers"
access = partial(Mutant, file="cuda/access.cuh")
halves = partial(Mutant, file="math/half_types.h")
surrogates = partial(Mutant, file="math/surrogates.h")
philox = partial(Mutant, file="math/philox.h")
options = partial(Mutant, file="math/lif_by_options.h")
params = partial(Mutant, file="params/neuron.h")
MUTANTS = {
    "float16 packed in the wrong order": halves(
        "half", old=f'"cvt.rn.f16x2.f32 %0, %1, %2;" : {PACK}', new=f'"cvt.rn.f16x2.f32 %0, %1, %2;" : {SWAPPED}'
    ),
    "bfloat16 packed in the wrong order": halves(
        "bfloat", old=f'"cvt.rn.bf16x2.f32 %0, %1, %2;" : {PACK}', new=f'"cvt.rn.bf16x2.f32 %0, %1, %2;" : {SWAPPED}'
    ),
    "bfloat16 packed as float16": halves("bfloat", old="cvt.rn.bf16x2.f32", new="cvt.rn.f16x2.f32"),
    "float16 packed towards zero": halves(
        "half", old="cvt.rn.f16x2.f32", new="cvt.rz.f16x2.f32", error="cvt.rz.f16x2.f32"
    ),
    "float16 read as an integer": halves("half", old="cvt.f32.f16", new="cvt.rn.f32.u16"),
    "float16 read as bfloat16": halves("half", old="cvt.f32.f16 %0, %1", new="mov.b32 %0, {0, %1}"),
    "max of a clamp without NaN": surrogates("float", old="max.NaN.f32", new="max.f32", error="max.f32"),
    "min of a clamp without NaN": surrogates("float", old="min.NaN.f32", new="min.f32", error="min.f32"),
    "a clamp that makes NaN 0": surrogates(
        "float", old="max.NaN.f32 %0, %1, 0f00000000;",
        new="{.reg .pred p; setp.gt.f32 p, %1, 0f00000000; selp.f32 %0, %1, 0f00000000, p;}",
    ),
    "clamp to another end": surrogates("float", old="%1, 0f3F800000", new="%1, 0f40000000"),
    "order of a vector store": access("float", old="{%1, %2, %3, %4}", new="{%1, %2, %4, %3}"),
    "half of a vector store": access("float", old="v4.f32 [%0], {%1, %2, %3, %4}", new="v2.f32 [%0], {%1, %2}"),
    "vector store beside its place": access("float", old=STORE, new=STORE.replace("(to)", "(to + 4)"), error=NOWHERE),
    "misaligned vector store": access("float", old="v4.f32 [%0],", new="v4.f32 [%0+4],", error="is misaligned"),
    "vector store to shared memory": access(
        "float", old="st.global.v4.f32", new="st.shared.v4.f32", error="is out of shared memory"
    ),
    "advance by four neurons more": access(
        "float", old='volatile("" : "+l"(element', new='volatile("add.s64 %0, %0, 4;" : "+l"(element', error=NOWHERE
    ),
    "Philox words of 16 bits": philox("noisy", old="using PhiloxWord = uint32;", new="using PhiloxWord = uint16;"),
    "words of the key swapped": Mutant(
        "backward", "cuda/noise.cuh", OPAQUE,
        OPAQUE.replace('""', '"{.reg .b32 t; mov.b32 t, %0; mov.b32 %0, %1; mov.b32 %1, t;}"', 1),
    ),
    "reciprocal of nothing": surrogates(
        "fast sigmoid", old="rcp.approx.ftz.f32 %0, %1", new="rcp.approx.ftz.f32 %0, %0"
    ),
    "reciprocal of another": surrogates("fast sigmoid", old='"=f"(result) : "f"(x)', new='"=f"(result) : "f"(1 + x)'),
    "outputs in another order": params(
        "float", old="  Scalar* s_seq;      // [outer, T, inner]\n  Real* v_last;       // [N]\n",
        new="  Real* v_last;\n  Scalar* s_seq;\n", error=NOWHERE,
    ),
    "a term that should be left out": Mutant("adaptive", "math/neuron.h", "condition ? value : 0.0f", "value"),
    "the other of two values": options(
        "adaptive", old="float a, float b) {\n  if (kBranches) return condition ? a : b",
        new="float a, float b) {\n  if (kBranches) return condition ? b : a",
    ),
    "no smooth values": options("adaptive", old="if (kBranches && analog) return analog_value(u, neuron);", new=""),
    "options in another order": Mutant(
        "float", "math/neuron.h", "  Real v_rest;\n  Real surrogate_gain;", "  Real surrogate_gain;\n  Real v_rest;"
    ),
    "a field too many": params(
        "float", old="  Scalar* s_seq;", new="  int64 more;\n  Scalar* s_seq;", error="its parameters take"
    ),
    "blocks of fewer threads": params(
        "float", old="kBlockThreads = 128", new="kBlockThreads = 64", error="a block has at most 64 threads, got 128"
    ),
}  # fmt: skip


def outcome(call: Callable[..., list[torch.Tensor]], backend: str) -> list[torch.Tensor] | str:
    """The results of a call, with NaN replaced, or its error."""
    try:
        return [torch.where(each.isnan(), 7.0, each) for each in call(backend)]
    except (RuntimeError, UnknownPTXError) as error:
        return str(error)


@pytest.fixture
def on_ptx(monkeypatch) -> Callable[..., list[torch.Tensor] | str]:
    """The outcome of a call on the PTX of csrc."""

    def run(call: str) -> list[torch.Tensor] | str:
        operators = SimpleNamespace(**ptx.Launcher(ptx.Machine()).operators())
        monkeypatch.setitem(backends.BACKENDS, "mutant", backends.Backend(("cpu",), operators, lambda: None))
        return outcome(CALLS[call], "mutant")

    return run


def is_equal(call: str, found: list[torch.Tensor] | str) -> bool:
    """Whether the outcome equals the emulation's without a mutant."""
    expected = outcome(CALLS[call], "emulated")
    assert not isinstance(expected, str), expected
    return not isinstance(found, str) and all(map(torch.equal, found, expected))


@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("call", CALLS)
def test_equal_without_a_mutant(on_ptx, call):
    found = on_ptx(call)
    assert is_equal(call, found), found


@pytest.mark.usefixtures("emulation")
@pytest.mark.parametrize("name", MUTANTS)
def test_mutant_is_found(on_ptx, monkeypatch, tmp_path, record_property, name):
    call, file, old, new, error = MUTANTS[name]
    csrc = shutil.copytree(emulated.ROOT / "csrc", tmp_path / "csrc")
    text = (csrc / file).read_text()
    assert text.count(old) == 1, f"{file} has changed: it has {text.count(old)} times {old}"
    (csrc / file).write_text(text.replace(old, new))
    monkeypatch.setattr(cupy, "source_directory", lambda: csrc)
    found = on_ptx(call)
    assert not is_equal(call, found)
    record_property(f"PTX: {name}", found.partition("\n")[0] if isinstance(found, str) else "other results")
    assert (isinstance(found, str) and error in found) if error else not isinstance(found, str), found
