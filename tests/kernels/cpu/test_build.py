"""The cache of compiled kernels: private, verified, shared by processes, loud when it cannot work."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparsefx.kernels.cpu import CompilerUnavailable, build

FAKE = """#!/bin/sh
if [ "$1" = --version ]; then echo fake 1; exit 0; fi
while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done
echo built >> {log}
echo library > "$out"
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A fresh cache folder and a compiler that only records that it ran."""
    log, compiler = tmp_path / "log", tmp_path / "compiler"
    compiler.write_text(FAKE.format(log=log))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path / "cache"))
    log.touch()
    return lambda: len(log.read_text().splitlines())


def test_built_once_into_a_private_folder(cache):
    path = build.library("portable")
    runs = cache()
    assert path.exists()
    assert runs > 1
    assert build.library("portable") == path
    assert cache() == runs
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not path.stat().st_mode & 0o077


@pytest.mark.parametrize("spoil", ["content", "record", "mode", "link"])
def test_unsound_entry_is_rebuilt(cache, spoil, tmp_path):
    path = build.library("portable")
    runs, sound = cache(), path.read_bytes()
    if spoil == "content":
        path.write_bytes(b"other")
    elif spoil == "record":
        path.with_suffix(".sha256").unlink()
    elif spoil == "mode":
        path.chmod(0o722)
    else:
        other = tmp_path / "elsewhere"
        other.write_bytes(sound)
        path.unlink()
        path.symlink_to(other)
    assert build.library("portable").read_bytes() == sound
    assert cache() == 2 * runs
    assert path.is_file()
    assert not path.is_symlink()


def test_folder_open_to_others_is_closed(cache):
    folder = Path(os.environ["SPARSEFX_CACHE"])
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    build.library("portable")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_processes_build_once(cache):
    code = f"import runpy; print(runpy.run_path({build.__file__!r})['library']('portable'))"  # without torch: quicker
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    paths = {process.communicate(timeout=120)[0] for process in processes}
    assert len(paths) == 1
    runs = cache()
    build.library("portable")
    assert cache() == runs == len(list(build.SOURCES.glob("*.cpp"))) + 1


def test_no_compiler_raises(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompilerUnavailable, match="set CXX"):
        build.library("portable")


def test_failing_compiler_raises(cache, tmp_path):
    Path(os.environ["CXX"]).write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho no such flag\nexit 1\n")
    with pytest.raises(CompilerUnavailable, match="no such flag"):
        build.library("portable")
    assert not list((tmp_path / "cache").glob("*.so"))


def test_unwritable_cache_raises(cache, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(CompilerUnavailable, match="SPARSEFX_CACHE"):
        build.library("portable")


def test_unknown_isa_raises(monkeypatch):
    monkeypatch.setenv("SPARSEFX_ISA", "sse9")
    with pytest.raises(ValueError, match="SPARSEFX_ISA"):
        build.default_isa()


def run_with_little_room(limit: int) -> subprocess.CompletedProcess:
    """Ask for the library where no file may grow beyond `limit` bytes, as on a disk that fills up."""
    code = (
        f"import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        f"print(runpy.run_path({build.__file__!r})['library']('portable'))"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("limit", [0, 2000])
def test_a_full_disk_raises_leaves_nothing_and_costs_nothing_later(cache, limit, tmp_path):
    compiler = Path(os.environ["CXX"])
    compiler.write_text(compiler.read_text().replace('echo library > "$out"', 'head -c 50000 /dev/zero > "$out"'))
    done = run_with_little_room(limit)
    folder = tmp_path / "cache"
    assert done.returncode != 0
    assert "CompilerUnavailable" in done.stderr
    assert not list(folder.glob("*.so"))
    assert not [path for path in folder.iterdir() if path.is_dir()]
    assert build.library("portable").stat().st_size == 50_000


def test_a_library_without_its_record_is_never_used(cache, tmp_path):
    """A builder that was killed between the two."""
    path = build.library("portable")
    runs = cache()
    path.write_bytes(b"half of a library")
    path.with_suffix(".sha256").unlink()
    assert build.library("portable").read_bytes() == b"library\n"
    assert cache() == 2 * runs


def test_a_killed_builder_holds_nobody_up(cache, tmp_path):
    compiler = Path(os.environ["CXX"])
    quick = compiler.read_text()
    compiler.write_text(quick.replace('echo library > "$out"', 'sleep 30; echo library > "$out"'))
    code = f"import runpy; runpy.run_path({build.__file__!r})['library']('portable')"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    deadline = time.monotonic() + 30
    while not cache():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    compiler.write_text(quick)
    start = time.monotonic()
    assert build.library("portable").read_bytes() == b"library\n"
    assert time.monotonic() - start < 20


def test_a_compiler_that_fails_is_not_asked_again(cache):
    """Training masks gradients and weights in every step, with torch's operators where there is no library."""
    compiler = Path(os.environ["CXX"])
    compiler.write_text(compiler.read_text().replace('echo library > "$out"', "exit 1"))
    code = """
import pathlib, sys, warnings
import torch
import sparsefx
warnings.simplefilter("ignore")
model = sparsefx.sparsify(torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)), 0.1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
model.scheduler.attach(optimizer, steps_per_update=2, total_steps=6)
asked = []
for _ in range(5):
    model(torch.randn(8, 64)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    asked.append(len(pathlib.Path(sys.argv[1]).read_text().splitlines()))
print(asked[0] > 0, asked[-1] - asked[0], sum(int(m.sum()) for m in sparsefx.masks(model).values()))
"""
    log = compiler.with_name("log")
    done = subprocess.run([sys.executable, "-c", code, str(log)], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "0", str(round(0.1 * (64 * 128 + 128 * 10)))], done.stderr
