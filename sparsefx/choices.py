"""Measured choices kept on disk, so that another process with the same CPU, code and torch measures nothing.

The environment variable `SPARSEFX_CHOICES` says what happens: `keep` (the default) reads and writes them, `measure`
measures everything anew and writes that, `off` neither reads nor writes.
"""

import functools
import hashlib
import json
import os
import platform
import tempfile
import warnings
from pathlib import Path

import torch

from sparsefx.errors import BackendWarning
from sparsefx.kernels.cpu import build

_MODES = ("keep", "measure", "off")
_read: dict[Path, dict[str, str]] = {}
_told: set[Path] = set()


def mode() -> str:
    """What `SPARSEFX_CHOICES` says.

    Raises:
        ValueError: it is none of "keep", "measure", "off".
    """
    chosen = os.environ.get("SPARSEFX_CHOICES") or "keep"
    if chosen not in _MODES:
        raise ValueError(
            f"SPARSEFX_CHOICES: expected one of {_MODES}, got {chosen!r}; unset it to keep choices on disk"
        )
    return chosen


def known(entry: str) -> str | None:
    """The choice that an earlier process measured for `entry`; None where it has to be measured."""
    return _choices().get(entry) if mode() == "keep" else None


def keep(entry: str, choice: str) -> None:
    """Write a choice for later processes. A folder that cannot be written is one warning."""
    if mode() == "off":
        return
    path = _path()
    try:
        folder = build.private_folder(path.parent)
        with build.locked(folder / f"{path.stem}.lock"):
            found = {**_load(path), entry: choice}
            handle, name = tempfile.mkstemp(dir=folder, suffix=".tmp")
            with open(handle, "w") as file:
                json.dump({"machine": fingerprint(), "choices": found}, file)
            os.replace(name, path)
    except OSError as error:
        if path not in _told:
            _told.add(path)
            warnings.warn(
                f"backend choices: expected a private writable folder with free space, got {error}; they are measured "
                "again in each process. Free space or set SPARSEFX_CACHE to another folder",
                BackendWarning,
                stacklevel=4,
            )
        return
    _read[path] = found


@functools.cache
def fingerprint() -> str:
    """A digest of what a choice depends on beside the call: processor, kernels, compiler, torch."""
    digest = hashlib.sha256()
    parts = [platform.machine(), build.cpu_name(), build.default_isa(), build.compiler_version(), torch.__version__]
    if torch.cuda.is_available():
        parts.append(torch.cuda.get_device_name())
    for part in parts:
        digest.update(part.encode() + b"\0")
    root = Path(build.__file__).parents[1]
    for source in sorted(path for path in root.rglob("*") if path.suffix in (".py", ".cpp", ".h")):
        digest.update(source.relative_to(root).as_posix().encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()


def _path() -> Path:
    return build.cache_dir() / f"choices-{fingerprint()[:24]}.json"


def _choices() -> dict[str, str]:
    path = _path()
    if path not in _read:
        _read[path] = _load(path)
    return _read[path]


def _load(path: Path) -> dict[str, str]:
    """Choices of a file; none where it is missing, damaged, of another machine, or could be another user's."""
    if not build.trusted(path):
        return {}
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(content, dict) or content.get("machine") != fingerprint():
        return {}
    found = content.get("choices")
    if not isinstance(found, dict):
        return {}
    return {entry: choice for entry, choice in found.items() if isinstance(choice, str)}
