"""Measures layers or training steps and prints the table of the page: `python -m benchmarks.speed PROGRAM`."""

from __future__ import annotations

import sys
import time
from typing import Any

from ..common import device_of, parser_of, write_json
from ..readme import SECTIONS, text_of
from . import convert, end_to_end, memory, recurrent
from .clocks import keep_memory
from .peers import introduced

PROGRAMS = {
    "convert": convert.measurements,
    "end_to_end": end_to_end.measurements,
    "memory": memory.measurements,
    "recurrent": recurrent.measurements,
}


def main() -> int:
    """Measures, and writes the results after each part."""
    parser = parser_of("benchmarks.speed", str(__doc__), "device", "repeats", "seconds", "json")
    parser.add_argument("program", choices=PROGRAMS, help="and `python -m benchmarks.speed.microbench`")
    arguments = parser.parse_args()
    started = time.monotonic()
    device = device_of(parser, arguments.device)
    keep_memory()
    report: dict[str, Any] = {"machine": introduced(device, f"medians of {arguments.repeats}")}
    for part in PROGRAMS[arguments.program](report, device, arguments.repeats):
        print(f"measured: {part}", flush=True)
        write_json(arguments.json, report)
        if time.monotonic() - started > arguments.seconds:
            print("the rest is not measured for want of time")
            break
    print(f"\n{text_of(SECTIONS[arguments.program], report)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
