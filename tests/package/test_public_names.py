"""The public names of the package, and its help in a screen or two."""

import pydoc
import types

import asgl_cuda


def test_dir_has_the_public_names():
    names = dir(asgl_cuda)
    assert [name for name in names if not name.startswith("__")] == sorted(
        name for name in (*asgl_cuda.__all__, "interop") if not name.startswith("__")
    )
    assert {"__all__", "__doc__", "__file__", "__name__", "__path__", "__spec__", "__version__"} < set(names)
    modules = [name for name in names if isinstance(getattr(asgl_cuda, name), types.ModuleType)]
    assert [name for name in modules if not name.startswith("__")] == ["interop"]


def test_help_is_short_and_names_everything():
    text = pydoc.plain(pydoc.render_doc(asgl_cuda))
    assert text.count("\n") < 120
    description = text.partition("PACKAGE CONTENTS")[0]
    for name in asgl_cuda.__all__:
        assert name.startswith("__") or f" {name} " in description.replace(",", " ").replace("\n", " "), name
    assert "nn.Module" not in text


def test_help_of_one_name_is_whole():
    assert "analog_prob" in pydoc.plain(pydoc.render_doc(asgl_cuda.LIF))
