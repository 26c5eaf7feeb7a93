"""What all tests share: seeds, one thread, and where the real data lie."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsefx.specialize import Specializer

CHOOSE_GRAPH = Specializer.choose_graph
ROOT = Path(__file__).resolve().parents[1]


def pytest_configure() -> None:
    """One thread: small shapes gain nothing from more, and float sums then have one order."""
    torch.set_num_threads(int(os.environ.get("SPARSEFX_TEST_THREADS", "1")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, none here"))


@pytest.fixture(autouse=True)
def choices_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads what an earlier one measured, or leaves anything behind."""
    monkeypatch.setenv("SPARSEFX_CHOICES", "off")


@pytest.fixture(autouse=True)
def layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models run layer by layer unless a test asks for another graph: on small shapes the dense one is often faster."""
    monkeypatch.setattr(Specializer, "choose_graph", lambda self, key, calls: "layers")


@pytest.fixture(params=["layers", "dense"])
def either_graph(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test holds layer by layer and in the dense graph; the name of the one that runs."""
    monkeypatch.setattr(Specializer, "choose_graph", lambda self, key, calls: request.param)
    return request.param


@pytest.fixture
def graph_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is chosen by measurement, as it is for users."""
    monkeypatch.setattr(Specializer, "choose_graph", CHOOSE_GRAPH)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return 0


@pytest.fixture(autouse=True)
def global_state_kept() -> Iterator[None]:
    """Put back the process-wide settings that a test may change."""
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    deterministic = torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)
    torch.set_default_dtype(dtype)
    if torch.are_deterministic_algorithms_enabled() != deterministic:
        torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's root folder."""
    return ROOT


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the real data sets: `SPARSEFX_DATA`, or `../shared/data` from the project's root."""
    path = Path(os.environ.get("SPARSEFX_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real data at {path}; set SPARSEFX_DATA to their folder")
    return path
