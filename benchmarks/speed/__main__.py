"""Measures layers or training steps and prints the table of docs/measured.md: `python -m benchmarks.speed PROGRAM`."""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from typing import Any

from ..common import device_of, parser_of, write_json
from ..readme import SECTIONS, text_of
from . import convert, end_to_end, memory, recurrent
from .clocks import keep_memory
from .networks import NETWORKS
from .peers import introduced

PROGRAMS = {
    "convert": convert.measurements,
    "end_to_end": end_to_end.measurements,
    "memory": memory.measurements,
    "recurrent": recurrent.measurements,
}


def main() -> int:
    """Runs the measurements of a program, and writes the results after each part."""
    parser = parser_of("benchmarks.speed", str(__doc__), "device", "repeats", "seconds", "json")
    parser.add_argument(
        "program", choices=PROGRAMS, help="measurement; for single layers see benchmarks.speed.microbench"
    )
    parts = (*NETWORKS, end_to_end.LONG_LOOP)
    parser.add_argument(
        "--networks", nargs="+", choices=parts, metavar="NAME",
        help=f"for end_to_end: measure only these, and keep the others that the JSON file has: {', '.join(parts)}",
    )  # fmt: skip
    arguments = parser.parse_args()
    started = time.monotonic()
    device = device_of(parser, arguments.device)
    keep_memory()
    report: dict[str, Any] = {"machine": introduced(device, f"medians of {arguments.repeats}")}
    measurements = PROGRAMS[arguments.program]
    if arguments.networks:
        if arguments.program != "end_to_end":
            parser.error(f"--networks is for end_to_end, got {arguments.program}")
        measurements = partial(end_to_end.measurements, chosen=arguments.networks)
        if arguments.json and arguments.json.exists():
            found = json.loads(arguments.json.read_text())
            if {**found["machine"], "load": report["machine"]["load"]} != report["machine"]:
                parser.error(
                    f"--json {arguments.json} was measured on another machine, commit or day: measure all networks "
                    "again, without --networks"
                )
            report = found
    for part in measurements(report, device, arguments.repeats):
        print(f"measured: {part}", flush=True)
        write_json(arguments.json, report)
        if time.monotonic() - started > arguments.seconds:
            print("the rest is not measured for want of time")
            break
    print(f"\n{text_of(SECTIONS[arguments.program], report)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
