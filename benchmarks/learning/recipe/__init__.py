"""The recipe of ASGL's authors as a program: `python -m benchmarks.learning.recipe --help`.

Among the benchmarks, not in a folder of examples: it shares their optimisers, the test suite trains it, and its results
are to stand beside those of the paper.
"""
