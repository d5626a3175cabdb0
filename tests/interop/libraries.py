"""Tests that compare with the other libraries import this before them: they are skipped where one is missing."""

import pytest

for name in ("norse", "sinabs", "snntorch", "spikingjelly"):
    pytest.importorskip(name)
