"""Committed pages are drawn from the committed figures."""

import pytest

from tools.kernels import resources
from tools.ptx import accesses
from tools.roofline import roofline


@pytest.mark.parametrize("page", [resources.PAGE, roofline.PAGE, accesses.PAGE], ids=lambda page: page.path.name)
def test_page_is_drawn_from_its_figures(page):
    """After a change of the text alone, the page's program redraws the page with --draw."""
    assert page.text(page.figures) == page.path.read_text()
