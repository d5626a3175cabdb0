"""The tools of maintainers; README.md lists them."""
