"""Mistakes that the tests of the Python package find."""
