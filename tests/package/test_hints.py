"""Install commands in errors name the packages of pyproject.toml, and never this one, which is on no index."""

import re
from pathlib import Path

import pytest

from asgl_cuda.backends import cupy
from asgl_cuda.interop.nir import neurons

ROOT = Path(__file__).parents[2]


def extra(name):
    (listed,) = re.findall(rf"^{name} = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return re.findall(r'"([^"]+)"', listed)


@pytest.mark.parametrize("name", ["nir", "cupy", "cupy12"])
def test_commands_name_what_the_extra_has(name, monkeypatch):
    monkeypatch.setattr(cupy.torch.version, "cuda", "12.8" if name == "cupy12" else "13.0")
    command = neurons.INSTALL if name == "nir" else cupy.install_command()
    assert command == "pip install " + " ".join(f'"{requirement}"' for requirement in extra(name))


def test_nothing_says_to_install_this_package_from_an_index():
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in (ROOT / "asgl_cuda").rglob("*.py")
        for line in path.read_text().splitlines()
        if re.search(r"pip install.*\basgl_cuda\b", line)
    ]
    assert not found
