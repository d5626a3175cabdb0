"""The measurements of asgl_cuda, each a module that `python -m` runs."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
