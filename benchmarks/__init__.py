"""The benchmarks and studies of asgl_cuda, each a program that `python -m` runs."""

import sys
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[1]

_shown_by = sys.excepthook


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """After Ctrl-C, prints one line that says how to continue, even during imports. In shells the status is 130."""
    if issubclass(kind, KeyboardInterrupt):
        print(f"interrupted; {error if error.args else 'the same command begins anew'}", file=sys.stderr)
    else:
        _shown_by(kind, error, trace)


sys.excepthook = _show
