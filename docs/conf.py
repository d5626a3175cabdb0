"""Sphinx configuration, for `make docs`."""

from __future__ import annotations

import hashlib
import importlib.metadata
import inspect
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent

# Import this checkout, not an installed package, here and in the tutorials' Jupyter kernels.
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))

import asgl_cuda  # noqa: E402
from benchmarks import palette  # noqa: E402
from docs import pages  # noqa: E402

project = "asgl_cuda"
author = "the authors of asgl_cuda"
version = release = asgl_cuda.__version__
html_title = f"asgl_cuda {version}"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["README.md"]
nitpicky = True

# ---- pages ----

html_theme = "furo"
pygments_dark_style = "github-dark"  # that of furo underlines modules as if they were links
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sourcelink = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": palette.BLUE, "color-brand-content": palette.BLUE},
    "dark_css_variables": {"color-brand-primary": palette.SKY, "color-brand-content": palette.SKY},
}
html_show_copyright = False
copybutton_exclude = ".linenos, .gp, .go"

myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 3

# MathJax is part of the site, so that equations need no network: one script and its fonts, of 24 MB.
mathjax_path = "mathjax/tex-chtml.js"

# ---- tutorials ----

# One cache for each state of the package, since a cache's keys are only the notebooks' own code.
nb_execution_mode = "cache"
_package = sorted((ROOT / "asgl_cuda").rglob("*.py"))
_state = hashlib.sha256(b"".join(file.read_bytes() for file in _package)).hexdigest()[:12]
nb_execution_cache_path = str(ROOT / "build" / "docs-notebooks" / _state)
nb_execution_timeout = 1200  # a cell takes half a minute, on a loaded machine ten times as long
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# ---- reference ----

autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_param = False  # parameters that share an entry stay together
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
nitpick_ignore = [
    ("py:class", "typing_extensions.Unpack"),
    ("py:class", "asgl_cuda.calls.arguments.NeuronArguments"),
    ("py:class", "asgl_cuda.training.monitor.ScalarWriter"),
    ("py:class", "asgl_cuda.calls.recompute._Context"),
    ("py:class", "asgl_cuda.calls.recompute.Module"),
    ("py:class", "nir.NIRGraph"),
]
_ALIASES = {
    "Module": "torch.nn.Module",
    "Tensor": "torch.Tensor",
    "AbstractContextManager": "contextlib.AbstractContextManager",
    "fx.GraphModule": "torch.fx.GraphModule",
    "nn.Module": "torch.nn.Module",
    "torch._C.Generator": "torch.Generator",
    "torch.nn.modules.module.Module": "torch.nn.Module",
}

# Offline, external names are resolved by small committed inventories, with the same addresses.
_ONLINE = os.environ.get("ASGL_DOCS_ONLINE") == "1"
intersphinx_mapping = {
    name: (address, None if _ONLINE else f"inventories/{name}.inv")
    for name, address in {
        "python": "https://docs.python.org/3/",
        "torch": "https://docs.pytorch.org/docs/stable/",
        "numpy": "https://numpy.org/doc/stable/",
    }.items()
}


def _read_page(app: Any, docname: str, source: list[str]) -> None:
    source[0] = pages.for_site(docname, source[0])
    for module in ("pages.py", "search_terms.py"):  # a page is read again where they change
        app.env.note_dependency(DOCS / module)


def _anchor_names(app: Any, doctree: Any) -> None:
    """Lets `functions.md#lif`, a heading on code hosts, lead to the entry of `asgl_cuda.lif`."""
    from sphinx.addnodes import desc_signature

    anchors = app.env.metadata[app.env.docname].get("myst_slugs", {})
    for entry in doctree.findall(desc_signature):
        for target in entry["ids"]:
            name = target.rpartition(".")[2]
            anchors[name.lower()] = (None, target, name)


def _copy_files(app: Any, error: Exception | None) -> None:
    """Copies figures of pages' HTML into the site, and the script at `mathjax_path` with its fonts."""
    if error is not None or app.builder.format != "html":
        return
    for file in (DOCS / "figures").glob("*.png"):
        (Path(app.outdir) / "figures").mkdir(exist_ok=True)
        shutil.copyfile(file, Path(app.outdir) / "figures" / file.name)
    target = Path(app.outdir) / "_static"
    for file in importlib.metadata.files("sphinx-mathjax-offline") or []:
        inside = Path(*file.parts[2:])  # relative to the package's static folder
        if inside.as_posix() == mathjax_path or "woff-v2" in inside.parts:
            (target / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file.locate(), target / inside)


def _is_public(name: str) -> bool:
    first, *rest = name.split(".")
    found = getattr(asgl_cuda, first, None) if first in asgl_cuda.__all__ else None
    for part in rest:
        found = getattr(found, part, None)
    return found is not None


_OTHERS_LIF = ("reference/conversion", "reference/nir")  # where LIF is another library's layer


def _code(role: str, rawtext: str, text: str, lineno: int, inliner: Any, *_: Any) -> Any:
    """Renders text in backticks as code, and public names as links."""
    from docutils import nodes
    from sphinx.addnodes import pending_xref

    environment = inliner.document.settings.env
    name = text.removesuffix("()")
    if name.startswith("asgl_cuda."):
        name = name.split("(")[0].removeprefix("asgl_cuda.")
    literal = nodes.literal(rawtext, text)
    described = environment.ref_context.get("py:class")
    if described is not None and _is_public(f"{described}.{name}"):
        name = f"{described}.{name}" if text.endswith("()") else ""  # a method; attributes are in sight
    if not _is_public(name) or (text == "LIF" and environment.docname in _OTHERS_LIF):
        return [literal], []
    options = {"refdomain": "py", "reftype": "obj", "reftarget": f"asgl_cuda.{name}", "refexplicit": True}
    return [pending_xref(rawtext, literal, refdoc=environment.docname, refwarn=True, **options)], []


def _known_elsewhere(app: Any, env: Any, node: Any, text: Any) -> Any:
    """Resolves an alias in an annotation by the name in the inventory."""
    from sphinx.ext.intersphinx import missing_reference

    if (target := _ALIASES.get(node["reftarget"])) is None:
        return None
    node["reftarget"] = target
    return missing_reference(app, env, node, text)


def _prose_with_colons(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Rewrites "Returns:" as `:returns:`, since napoleon parses text before a colon as the type."""
    if "Returns:" not in lines:
        return
    start = lines.index("Returns:")
    end = start + 1
    while end < len(lines) and (not lines[end] or lines[end].startswith(" ")):
        end += 1
    first, *rest = (line.strip() for line in lines[start + 1 : end])
    lines[start:end] = [f":returns: {first}", *(f"    {line}" if line else "" for line in rest)]


def _property_as_it_is(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Undoes napoleon's parsing of a type in a property."""
    if what == "property":
        lines[:] = [*inspect.cleandoc(thing.__doc__ or "").splitlines(), ""]


def _without_unknown(app: Any, what: str, name: str, thing: Any, options: Any, signature: Any, returns: Any) -> Any:
    """Leaves out `**unknown`, which only says what an unknown argument may have meant."""
    return re.sub(r", \*\*unknown: [\w.~]+", "", signature or "") or None, returns


def setup(app: Any) -> None:
    """Configures matplotlib and the Jupyter kernels, and connects the functions above."""
    os.environ["MATPLOTLIBRC"] = str(palette.write_matplotlibrc(ROOT / "build" / "matplotlibrc"))
    # A separate IPython profile: no user's startup files, and no warning on the kernel's transport.
    profile = ROOT / "build" / "ipython" / "profile_default"
    profile.mkdir(parents=True, exist_ok=True)
    (profile / "ipython_kernel_config.py").write_text("c.IPKernelApp.log_level = 40\n")
    os.environ["IPYTHONDIR"] = str(profile.parent)
    app.add_role("code_or_link", _code)
    # Writes all pages, changed or not: the search loses the index entries of those that are not written again.
    app.connect("env-updated", lambda _, env: sorted(env.all_docs))
    app.connect("autodoc-process-docstring", _prose_with_colons, priority=100)
    app.connect("autodoc-process-docstring", _property_as_it_is, priority=900)
    app.connect("autodoc-process-signature", _without_unknown)
    app.connect("missing-reference", _known_elsewhere, priority=400)
    app.connect("source-read", _read_page)
    app.connect("doctree-read", _anchor_names)
    app.connect("build-finished", _copy_files)


default_role = "code_or_link"
