"""Trains the networks of a study and prints its table: `python -m benchmarks.learning STUDY`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ..common import parser_of
from ..readme import SECTIONS, text_of
from .defaults import DEFAULTS
from .neurons import ADAPTATION, CALIBRATION, RESIDUAL_NETWORK
from .noise import GRADIENTS, NOISE, SMOOTHING
from .sparse import SPARSE
from .widths import WIDTH_STEP, width_robustness

STUDIES = {
    study.name: study
    for study in (
        width_robustness(), WIDTH_STEP, DEFAULTS, NOISE, GRADIENTS, SMOOTHING, ADAPTATION, CALIBRATION,
        RESIDUAL_NETWORK, SPARSE,
    )
}  # fmt: skip


def main() -> int:
    """Trains the runs of a study that its result file lacks."""
    parser = parser_of("benchmarks.learning", str(__doc__), "json")
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="training runs at a time (default: cores)"
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="only runs whose fields contain this, such as 'Adam 0.1'"
    )
    parser.add_argument(
        "--data-root", type=Path, metavar="DIR", help="folder with more data sets, for width_robustness"
    )
    arguments = parser.parse_args()
    root, study = arguments.data_root, STUDIES[arguments.study]
    if root is not None:
        if not root.is_dir():
            parser.error(f"--data-root must be a folder that exists, got {root}")
        study = width_robustness(root)
    if not any(arguments.only in study.text(run) for run in study.runs):
        parser.error(f"--only {arguments.only!r} is in no run; the first one is {study.text(study.runs[0])!r}")
    file = arguments.json or Path("build") / f"{study.name}.json"
    file.parent.mkdir(exist_ok=True)
    report = study.conduct(file, arguments.jobs, arguments.only)
    print(f"{text_of(SECTIONS[study.name], report)}\n\nin {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
