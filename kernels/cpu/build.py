"""Compile the C++ kernels at first use, into a private cache shared by processes."""

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
ISAS = ("avx512", "avx2", "portable")
_COMMON = ["-std=c++17", "-O2", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-fvisibility=default", "-Wall", "-Wextra"]
_FLAGS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    "avx2": ["-mavx2", "-mfma"],
    "portable": [],
}
_LANES = {"avx512": 16, "avx2": 8, "portable": 4}
_NEEDS = {"avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"}, "avx2": {"avx2", "fma"}, "portable": set()}


class CompilerUnavailable(RuntimeError):
    """The CPU kernels cannot be built here: no C++ compiler, a failed compilation, or no room for the result."""


@functools.cache
def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


@functools.cache
def cpu_name() -> str:
    """The processor as the kernel calls it: vendor's name, family and model."""
    found: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            found.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    if "model name" not in found:
        return platform.processor() or platform.machine()
    return f"{found['model name']} (family {found.get('cpu family', '?')}, model {found.get('model', '?')})"


@functools.cache
def supported_isas() -> tuple[str, ...]:
    """Instruction sets that this processor runs, fastest first; "portable" is always the last."""
    return tuple(isa for isa in ISAS if _NEEDS[isa] <= _cpu_flags())


def default_isa() -> str:
    """The instruction set to use: environment variable `SPARSEFX_ISA`, or the fastest that this processor runs.

    Raises:
        ValueError: if `SPARSEFX_ISA` names none of "avx512", "avx2", "portable", or one this processor lacks.
    """
    isa = os.environ.get("SPARSEFX_ISA") or supported_isas()[0]
    if isa not in supported_isas():
        raise ValueError(f"SPARSEFX_ISA: expected one of {supported_isas()}, got {isa!r}; unset it to choose the best")
    return isa


def cache_dir() -> Path:
    """The private folder of compiled kernels: `SPARSEFX_CACHE`, or `sparsefx` in the user's XDG cache."""
    chosen = os.environ.get("SPARSEFX_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparsefx"


def library(isa: str) -> Path:
    """Path of the shared library for `isa`, compiled if the cache does not hold a sound one.

    Several processes may ask at once; one builds. A library is used only if it is a regular file of this user, not
    writable by others, and its SHA-256 is the recorded one; otherwise it is built anew.

    Raises:
        CompilerUnavailable: if there is no compiler, it fails, or the cache cannot be written.
    """
    compiler = _compiler()
    command = [compiler, *_COMMON, *_FLAGS[isa], f"-DSFX_LANES={_LANES[isa]}"]
    try:
        folder = private_folder(cache_dir())
        target = folder / f"cpu-{isa}-{_key(command)}.so"
        if _sound(target):
            return target
        with locked(folder / f"{target.stem}.lock"):
            if not _sound(target):
                _compile(command, folder, target)
    except OSError as error:
        raise CompilerUnavailable(
            f"kernel cache: expected a private writable folder with free space, got {error}; "
            "free space or set SPARSEFX_CACHE to another folder"
        ) from error
    return target


def _compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for name in names:
        if path := shutil.which(name):
            return path
    raise CompilerUnavailable(
        f"CPU kernels: expected a C++17 compiler, got none of {names} on PATH; install g++ or set CXX"
    )


@functools.cache
def _version(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise CompilerUnavailable(f"CPU kernels: expected {compiler} to run, got {error}; set CXX") from error


def compiler_version() -> str:
    """What the compiler calls itself; "none" where there is none that runs."""
    try:
        return _version(_compiler())
    except CompilerUnavailable:
        return "none"


def _key(command: list[str]) -> str:
    digest = hashlib.sha256()
    for part in [*command, _version(command[0]), platform.machine(), *sorted(_cpu_flags())]:
        digest.update(part.encode() + b"\0")
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:24]


def private_folder(folder: Path) -> Path:
    """Make a folder that no other user can read or write.

    Raises:
        OSError: it is another user's, or cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = folder.stat()
    if info.st_uid != os.getuid():
        raise PermissionError(f"{folder} of user {info.st_uid}")
    if info.st_mode & 0o077:
        folder.chmod(0o700)
    return folder


def trusted(path: Path) -> bool:
    """Whether `path` is a regular file of this user that nobody else can write."""
    try:
        info = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o022


def _sound(target: Path) -> bool:
    if not (trusted(target) and trusted(target.with_suffix(".sha256"))):
        return False
    try:
        return target.with_suffix(".sha256").read_text() == hashlib.sha256(target.read_bytes()).hexdigest()
    except OSError:
        return False


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock that `path` stands for, among processes."""
    with open(path, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _compile(command: list[str], folder: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        sources = sorted(SOURCES.glob("*.cpp"))
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        _run([[*command, "-c", str(s), "-o", str(o)] for s, o in zip(sources, objects, strict=True)])
        built, record = Path(scratch) / "library.so", Path(scratch) / "library.sha256"
        _run([[*command, "-shared", *map(str, objects), "-o", str(built)]])
        built.chmod(0o700)
        record.write_text(hashlib.sha256(built.read_bytes()).hexdigest())
        record.chmod(0o600)
        os.replace(built, target)
        os.replace(record, target.with_suffix(".sha256"))


def _run(commands: list[list[str]]) -> None:
    """Run compiler commands, as many at a time as there are processors."""
    width = max(1, os.cpu_count() or 1)
    for start in range(0, len(commands), width):
        running = [
            subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for c in commands[start : start + width]
        ]
        try:
            outputs = [process.communicate()[0] for process in running]
        finally:
            for process in running:
                process.kill()
                process.wait()
        for process, output in zip(running, outputs, strict=True):
            if process.returncode:
                raise CompilerUnavailable(f"CPU kernels: {commands[0][0]} failed: {output[-2000:]}")
