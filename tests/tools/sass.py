"""SASS instructions for tests."""

from __future__ import annotations

import re

from tools.kernels.cuda_code import Instruction


def sass(text: str) -> list[Instruction]:
    """One instruction a line, at addresses 0x0, 0x10, ..."""
    lines = (re.match(r"(?:@(\S+) )?(\S+) ?(.*)", line.strip()) for line in text.strip().splitlines())
    return [Instruction(16 * i, m[1] or "", m[2], m[3]) for i, m in enumerate(lines)]
