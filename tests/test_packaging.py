"""A wheel built from the tree is complete and works on its own, from any folder."""

import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

SHIPPED = {".py", ".cpp", ".h", ".json", ".typed"}
IGNORED = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built, without the network, from a copy of the tree (setuptools writes into the folder it builds)."""
    folder = tmp_path_factory.mktemp("packaging")
    for name in ("sparsefx", "kernels"):
        shutil.copytree(root / name, folder / "tree" / name, ignore=IGNORED)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, folder / "tree" / name)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*command, "-w", folder, folder / "tree"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


def shipped(root: Path) -> set[str]:
    """Path inside the wheel of every file that must be there."""
    names = set()
    for folder, prefix in (("sparsefx", "sparsefx"), ("kernels", "sparsefx/kernels")):
        files = [path for path in (root / folder).rglob("*") if path.suffix in SHIPPED]
        names |= {f"{prefix}/{path.relative_to(root / folder).as_posix()}" for path in files}
    return names


def test_wheel_holds_every_source_and_nothing_else(root: Path, wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == shipped(root)
    assert {"sparsefx/py.typed", "sparsefx/kernels/__init__.py"} <= names


def test_wheel_imports_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "elsewhere").mkdir()
    # -S leaves out the .pth file of the editable install; site-packages is then an ordinary folder with torch in it.
    code = f"""
import sys
sys.path[:0] = [{str(tmp_path / "site")!r}]
sys.path.append({sysconfig.get_path("purelib")!r})
import sparsefx, sparsefx.kernels
print(sparsefx.__file__, sparsefx.kernels.__file__, sep="\\n")
"""
    command = [sys.executable, "-I", "-S", "-c", code]
    done = subprocess.run(command, cwd=tmp_path / "elsewhere", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site" / "sparsefx"
    assert done.stdout.split() == [str(site / "__init__.py"), str(site / "kernels" / "__init__.py")]


def test_every_package_is_declared(root: Path) -> None:
    declared = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = set()
    for folder, prefix in (("sparsefx", "sparsefx"), ("kernels", "sparsefx.kernels")):
        for path in (root / folder).rglob("*.py"):
            found.add(".".join([prefix, *path.parent.relative_to(root / folder).parts]))
    assert sorted(declared) == sorted(found)
