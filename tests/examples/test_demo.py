import json
from pathlib import Path

import pytest

from examples import demo

TINY = ["--epochs", "3", "--seeds", "1", "--width", "8", "--threads", "1", "--density", "0.2"]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("demo")
    return demo.main([*TINY, "--out", str(folder)]), folder


def test_dense_and_sparse_both_learn_real_digits(result: tuple[dict, Path]) -> None:
    (run,) = result[0]["runs"]
    assert run["dense_accuracy"][-1] > 90
    assert run["sparse_accuracy"][-1] > 80


def test_counts_are_exact_and_every_update_is_in_the_curve(result: tuple[dict, Path]) -> None:
    (run,) = result[0]["runs"]
    assert run["existing_weights"] == round(0.2 * run["weights"])
    steps = result[0]["settings"]["steps_per_update"]
    assert [row["step"] for row in run["densities"]] == [0, steps, 2 * steps]
    assert all(
        set(row) == {"step", "conv1.weight", "conv2.weight", "conv3.weight", "fc.weight"} for row in run["densities"]
    )


def test_files_hold_what_was_measured(result: tuple[dict, Path]) -> None:
    saved = json.loads((result[1] / "demo.json").read_text())
    assert saved == result[0]
    assert (result[1] / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_table_names_the_machine_and_the_ratio(result: tuple[dict, Path]) -> None:
    text = demo.table(result[0])
    step = result[0]["step_ms"]
    assert f"{step['dense'] / step['sparse']:.2f}x" in text
    assert result[0]["machine"] in text


def test_digits_are_split_without_overlap() -> None:
    images, labels, test_images, test_labels = demo.digits()
    assert (len(images), len(test_images)) == (1347, 450)
    assert len(labels) == 1347
    assert len(test_labels) == 450
    assert set(test_labels.tolist()) == set(range(10))
