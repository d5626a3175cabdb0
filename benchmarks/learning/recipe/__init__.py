"""The training recipe of ASGL's authors as a program: `python -m benchmarks.learning.recipe --help`."""
