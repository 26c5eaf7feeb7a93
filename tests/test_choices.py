"""Choices on disk: another process measures nothing; what is damaged or foreign is ignored; nothing is shared."""

import json
import shutil
import stat
import subprocess
import sys

import pytest
import torch
from torch import nn

import sparsefx
from sparsefx import choices, specialize
from sparsefx.kernels.cpu import build

pytestmark = pytest.mark.usefixtures("graph_measured")
CODE = """
import json, torch
from torch import nn
import sparsefx
from sparsefx import specialize

def never(*_):
    raise AssertionError("measured")

specialize.interleaved = never
torch.set_num_threads(1)
torch.manual_seed(0)
model = sparsefx.sparsify(nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 8, 3)), 0.1)
model(torch.ones(2, 3, 8, 8)).sum().backward()
print(json.dumps(model.scheduler.specializer.table))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache that has only the compiled kernels."""
    library = build.library(build.default_isa())
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    for path in (library, library.with_suffix(".sha256")):
        shutil.copy2(path, cache)
    monkeypatch.setenv("SPARSEFX_CACHE", str(cache))
    monkeypatch.setenv("SPARSEFX_CHOICES", "keep")
    monkeypatch.setattr(choices, "_read", {})
    return cache


def trained():
    torch.manual_seed(0)
    model = sparsefx.sparsify(nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 8, 3)), 0.1)
    model(torch.ones(2, 3, 8, 8)).sum().backward()
    return model.scheduler.specializer.table


def file(folder):
    (path,) = folder.glob("choices-*.json")
    return path


def forbid(monkeypatch):
    def never(*_):
        raise AssertionError("measured")

    monkeypatch.setattr(specialize, "interleaved", never)


def test_a_second_process_measures_nothing(folder):
    table = trained()
    assert table
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout).items() <= table.items()


def test_a_second_model_measures_nothing(folder, monkeypatch):
    table = trained()
    forbid(monkeypatch)
    assert trained().items() <= table.items()
    assert stat.S_IMODE(file(folder).stat().st_mode) == 0o600


@pytest.mark.parametrize("spoil", ["text", "list", "machine", "values", "mode", "link"])
def test_a_damaged_or_foreign_file_is_ignored_and_replaced(folder, monkeypatch, spoil, tmp_path):
    trained()
    path = file(folder)
    content = json.loads(path.read_text())
    wrong = dict.fromkeys(content["choices"], "wrong")
    if spoil == "text":
        path.write_text(path.read_text()[:-9])
    elif spoil == "list":
        path.write_text(json.dumps([1, 2]))
    elif spoil == "machine":
        path.write_text(json.dumps({"machine": "another", "choices": wrong}))
    elif spoil == "values":
        path.write_text(json.dumps({**content, "choices": wrong | {"x": 3}}))
    elif spoil == "mode":
        path.chmod(0o622)
    else:
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    choices._read.clear()
    measured = []
    real = specialize.interleaved
    monkeypatch.setattr(specialize, "interleaved", lambda *args: measured.append(1) or real(*args))
    table = trained()
    assert len(measured) == len(table)
    choices._read.clear()
    assert {choices.known(entry) for entry in table if "regions" not in entry} <= set(specialize.BACKENDS)
    assert path.is_file()
    assert not path.is_symlink()


def test_measured_again_only_on_request(folder, monkeypatch):
    trained()
    path = file(folder)
    content = json.loads(path.read_text())
    lie = {entry: "dense" for entry in content["choices"] if "regions" not in entry}
    path.write_text(json.dumps({**content, "choices": content["choices"] | lie}))
    choices._read.clear()
    monkeypatch.setattr(specialize, "interleaved", lambda calls, device: list(range(len(calls), 0, -1)))
    assert {choice for entry, choice in trained().items() if "regions" not in entry} == {"dense"}
    monkeypatch.setenv("SPARSEFX_CHOICES", "measure")
    assert {choice for entry, choice in trained().items() if "regions" not in entry} != {"dense"}
    monkeypatch.setenv("SPARSEFX_CHOICES", "keep")
    choices._read.clear()
    forbid(monkeypatch)
    assert {choice for entry, choice in trained().items() if "regions" not in entry} != {"dense"}


def test_a_resumed_choice_wins_over_the_one_on_disk(folder, monkeypatch):
    table = trained()
    saved = {"machine": specialize.machine(), "table": {e: "dense" for e in table if "regions" not in e}}
    forbid(monkeypatch)
    model = sparsefx.sparsify(nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 8, 3)), 0.1)
    model.scheduler.specializer.load_state_dict(saved)
    model(torch.ones(2, 3, 8, 8)).sum().backward()
    assert model.scheduler.specializer.table == {**table, **saved["table"]}


def test_off_leaves_no_file(folder, monkeypatch):
    monkeypatch.setenv("SPARSEFX_CHOICES", "off")
    assert trained()
    assert not list(folder.glob("choices-*"))


def test_a_folder_that_cannot_be_written_is_one_warning(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPARSEFX_CACHE", str(tmp_path / "file" / "below"))
    monkeypatch.setenv("SPARSEFX_CHOICES", "keep")
    monkeypatch.setattr(choices, "_told", set())
    with pytest.warns(sparsefx.errors.BackendWarning, match="SPARSEFX_CACHE"):
        choices.keep("a", "dense")
    choices.keep("b", "dense")  # a second warning would be an error


def test_unknown_mode_raises(monkeypatch):
    monkeypatch.setenv("SPARSEFX_CHOICES", "maybe")
    with pytest.raises(ValueError, match="SPARSEFX_CHOICES"):
        choices.mode()


def test_without_a_compiler_a_kept_choice_of_the_kernels_is_not_taken(monkeypatch):
    def fail(mask, spec):
        raise specialize.CompilerUnavailable("no g++ here")

    model = sparsefx.sparsify(nn.Sequential(nn.Linear(40, 40)), 0.1)
    x = torch.randn(8, 40)
    monkeypatch.setattr(specialize, "interleaved", lambda calls, device: list(range(len(calls), 0, -1)))
    model(x).sum().backward()
    state = model.scheduler.specializer.state_dict()
    assert "sparse" in model.scheduler.specializer.table.values()
    monkeypatch.setitem(specialize.BACKENDS, "sparse", fail)
    other = sparsefx.sparsify(nn.Sequential(nn.Linear(40, 40)), 0.1)
    other.scheduler.specializer.load_state_dict(state)
    with pytest.warns(sparsefx.errors.BackendWarning, match="no g\\+\\+ here"):
        other(x).sum().backward()
    assert "sparse" not in other.scheduler.specializer.backends(other[0]).values()
