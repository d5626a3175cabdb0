"""The measurements of asgl_cuda, each a module that `python -m` runs."""

import sys
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[1]

_shown_by = sys.excepthook


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """One line after Ctrl-C, also during imports: how to go on. Python then ends by the signal, 130 in shells."""
    if issubclass(kind, KeyboardInterrupt):
        print(f"interrupted; {error if error.args else 'the same command begins anew'}", file=sys.stderr)
    else:
        _shown_by(kind, error, trace)


sys.excepthook = _show
