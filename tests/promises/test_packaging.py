"""The wheel works away from the source tree, and the lock file covers what is installed for development."""

from __future__ import annotations

import email
import json
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.wheel import ROOT, away_from_source, build_wheel, delivered

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.slow

USED = """
import sys, unirank
assert unirank.__file__.startswith({installed!r}), unirank.__file__
sys.argv = ["unirank", *{arguments!r}]
from unirank.cli.main import main
main()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_is_one_for_every_python_and_names_no_folder_of_its_builder(wheel: Path) -> None:
    assert re.fullmatch(r"unirank-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    assert wheel.stat().st_size < 2**20
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert {name.split("/")[0].split("-")[0] for name in names} == {"unirank"}
        assert "unirank/unirank_cpu.so" in names
        info = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(info))
        assert metadata["License-Expression"] == "Apache-2.0"
        assert any(name.endswith("licenses/LICENSE") for name in names)
        for name in names:
            content = archive.read(name)
            for folder in (str(ROOT), str(wheel.parent), sysconfig.get_path("purelib")):
                assert folder.encode() not in content, (name, folder)


def test_the_wheel_compresses_a_model(wheel: Path, model_dir: Path, text_file: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    command = away_from_source(wheel, installed)

    def unirank(*arguments: str) -> str:
        code = USED.format(installed=str(installed), arguments=arguments)
        done = subprocess.run([*command, code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert set(json.loads(unirank("info", "--json"))["native_ops"]) >= {"gram_accumulate_", "cosine_accumulate_"}
    data = ["--calib", str(text_file), "--windows", "4", "--window", "16", "--device", "cpu"]
    said = json.loads(unirank("compress", str(model_dir), "-r", "0.3", "-o", "small", "--json", *data))
    assert (tmp_path / "small" / "model.safetensors").is_file(), said


def test_the_lock_covers_what_development_installs() -> None:
    """A pin with hashes for every requirement of the project, of its extras (lm-eval apart), and of the build."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = list(project["dependencies"])
    for extra, requirements in project["optional-dependencies"].items():
        lines += requirements if extra != "eval" else []
    lines += [
        line for line in (ROOT / "requirements" / "build.in").read_text().splitlines() if line[:1] not in ("", "#")
    ]
    pins: dict[str, list[str]] = {}
    for block in re.split(r"\n(?=\S)", (ROOT / "requirements" / "dev.lock").read_text()):
        if block.startswith("#"):
            continue
        pin = Requirement(block.split("\\")[0])
        assert "--hash=sha256:" in block, block
        (specifier,) = pin.specifier
        assert specifier.operator == "=="
        pins.setdefault(canonicalize_name(pin.name), []).append(specifier.version)
    for requirement in map(Requirement, lines):
        name = canonicalize_name(requirement.name)
        if name != "torch":  # installed first and by name
            assert any(requirement.specifier.contains(version) for version in pins.get(name, [])), requirement
    assert "torch" not in pins


def test_the_source_has_what_a_build_needs_and_no_more(tmp_path: Path) -> None:
    source = delivered(tmp_path / "source")
    code = f"from scikit_build_core.build import build_sdist; print(build_sdist({str(tmp_path)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    folders = [source / name for name in ("unirank", "csrc", "cmake")]
    needed = {str(f.relative_to(source)) for folder in folders for f in folder.rglob("*") if f.is_file()}
    assert needed | {"pyproject.toml", "CMakeLists.txt", "LICENSE"} <= names
    assert names - needed == {"pyproject.toml", "CMakeLists.txt", "LICENSE", "README.md", "CHANGELOG.md", "PKG-INFO"}
