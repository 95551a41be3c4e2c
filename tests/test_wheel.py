"""Checks a wheel: its tag, its content, its size, and the newest symbols that its modules need.

``make wheel`` checks the wheel it made (BDPRUNE_WHEEL). Otherwise, the tests pack the modules built in place.
"""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

import bdprune

ROOT = Path(__file__).resolve().parent.parent
MODULES = {"bdprune/_C.abi3.so", "bdprune/_core.abi3.so"}
MOST_BYTES = 1_500_000
NEWEST = {"GLIBC": (2, 14), "GLIBCXX": (3, 4, 21), "CXXABI": (1, 3, 11), "GCC": (3, 0)}
"""Newest symbol versions; manylinux_2_27 has them all. torch needs manylinux_2_28."""
MANYLINUX = "manylinux_2_27_x86_64.manylinux_2_28_x86_64"
NEWEST_COMPILER = 12
"""Newest major version of GCC that is known to keep to NEWEST."""
SYSTEM = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6", "ld-linux-x86-64.so.2"}
TORCH = {"libc10.so", "libtorch.so", "libtorch_cpu.so"}


def pack(folder: Path) -> Path:
    """A wheel of the modules that are built in place."""
    built = [ROOT / name for name in sorted(MODULES)]
    if not all(one.exists() for one in built):
        pytest.skip("the native modules are not built")
    (folder / "lib" / "bdprune").mkdir(parents=True)
    for one in built:
        shutil.copy(one, folder / "lib" / "bdprune")
    (folder / "dist.cfg").write_text(
        f"[build]\nbuild_lib = {folder / 'lib'}\n[egg_info]\negg_base = {folder}\n"
        f"[bdist_wheel]\nskip_build = 1\nbdist_dir = {folder / 'tree'}\ndist_dir = {folder}\n"
    )
    env = {**os.environ, "DIST_EXTRA_CONFIG": str(folder / "dist.cfg"), "FORCE_CUDA": "0"}
    command = [sys.executable, "setup.py", "--quiet", "build_py", "bdist_wheel"]
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    given = os.environ.get("BDPRUNE_WHEEL")
    if not given and (os.environ.get("BDPRUNE_SANITIZE") or os.environ.get("DEBUG", "0") not in ("", "0")):
        pytest.skip("a debug or sanitizer build is not for a wheel")
    return Path(given) if given else pack(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def versions(module: bytes) -> dict[str, tuple[int, ...]]:
    """The newest version of each kind of symbol that a module needs."""
    found: dict[str, tuple[int, ...]] = {}
    for _, symbols in ELFFile(BytesIO(module)).get_section_by_name(".gnu.version_r").iter_versions():
        for symbol in symbols:
            kind, _, version = symbol.name.partition("_")
            found[kind] = max(found.get(kind, ()), tuple(map(int, version.split("."))))
    return found


def test_one_tag_serves_every_later_python(wheel: Path, files: dict[str, bytes]) -> None:
    platform = MANYLINUX if "BDPRUNE_WHEEL" in os.environ else "linux_x86_64"
    assert wheel.name == f"bdprune-{bdprune.__version__}-cp311-abi3-{platform}.whl"
    metadata = files[f"bdprune-{bdprune.__version__}.dist-info/METADATA"].decode()
    assert "\nRequires-Python: >=3.11\n" in metadata and "\nRequires-Dist: torch>=2.11\n" in metadata


def test_the_wheel_contains_only_the_package(files: dict[str, bytes]) -> None:
    folders = {name.split("/")[0] for name in files}
    assert folders == {"bdprune", f"bdprune-{bdprune.__version__}.dist-info"}
    package = {name for name in files if name.startswith("bdprune/")}
    assert {name for name in package if name.endswith(".so")} == MODULES
    assert {Path(name).suffix for name in package} == {".py", ".so", ".j2", ".js", ".json", ".toml", ".typed"}
    assert {"bdprune/py.typed", "bdprune/report/templates/report.html.j2", "bdprune/zoo/__init__.py"} <= package
    assert not any("test_" in name or name.endswith("conftest.py") for name in package)


def test_the_wheel_contains_every_module_of_the_package(files: dict[str, bytes]) -> None:
    package = Path(bdprune.__file__).parent
    here = {f"bdprune/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")}
    assert {name for name in files if name.startswith("bdprune/") and name.endswith(".py")} == here


def test_the_wheel_is_small(wheel: Path) -> None:
    assert wheel.stat().st_size <= MOST_BYTES


@pytest.mark.parametrize("module", sorted(MODULES))
def test_symbols_are_as_old_as_those_that_torch_needs(module: str, files: dict[str, bytes]) -> None:
    named = re.search(rb"GCC: \([^)]*\) (\d+)", files[module])
    compiler = int(named[1]) if named else 0
    if compiler > NEWEST_COMPILER and "BDPRUNE_WHEEL" not in os.environ:
        pytest.skip(f"the modules come from GCC {compiler}; build wheels with GCC {NEWEST_COMPILER} or older")
    found = versions(files[module])
    assert {kind: version for kind, version in found.items() if version > NEWEST[kind]} == {}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_modules_contain_no_path_of_the_build_machine(module: str, files: dict[str, bytes]) -> None:
    content = files[module]
    for path in (ROOT, sys.prefix, sys.base_prefix, Path.home()):
        assert f"{path}/".encode() not in content
    tags = list(ELFFile(BytesIO(content)).get_section_by_name(".dynamic").iter_tags())
    assert not [tag for tag in tags if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")]
    needed = {tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"}
    assert needed <= SYSTEM | (TORCH if module.endswith("_C.abi3.so") else set())


def test_without_a_source_tree_the_installed_package_is_tested() -> None:
    importlib.import_module("torch")  # loads the libraries that the ops need
    home = ROOT if (ROOT / "setup.py").exists() else Path(sysconfig.get_path("platlib"))
    for name in ("bdprune", "bdprune._core", "bdprune._C"):
        module = pytest.importorskip(name, reason=f"{name} is not built", exc_type=ModuleNotFoundError)
        assert Path(module.__file__).is_relative_to(home)
