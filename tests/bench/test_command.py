"""The command line: every combination is a process of its own; one that fails does not end the others."""

import argparse
import json

import pytest

from sparsefx.__main__ import main
from sparsefx.bench import SETTINGS, command
from sparsefx.bench.report import plot
from sparsefx.bench.settings import PROMISED, machine
from sparsefx.errors import SparsefxError


def options(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)


def test_jobs_are_the_product():
    jobs = command.jobs(options("--models", "lenet300", "vgg16-d", "--densities", "0.2", "0.01", "--threads", "1", "2"))
    assert len(jobs) == 8
    assert {job["batch"] for job in jobs if job["model"] == "vgg16-d"} == {128}
    assert [job["model"] for job in command.jobs(options("--models", "all"))] == PROMISED
    assert all(job["density"] == SETTINGS[job["model"]].density for job in command.jobs(options("--models", "all")))


def test_a_network_from_the_command_line(tmp_path, capsys):
    out = tmp_path / "rows.json"
    words = ["--models", "lenet300", "--no-compile", "--rounds", "3", "--threads", "1", "--parts", "step", "memory"]
    main(["bench", *words, "--json", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["model"], row["batch"], row["threads"]) == ("lenet300", 100, 1)
    assert row["parameters"] == 266_610
    assert "memory" in row
    assert "breakdown" not in row
    assert f"| {row['ratio']:.2f} |" in capsys.readouterr().out


def test_a_process_that_fails_is_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.executable", "false")
    out = tmp_path / "rows.json"
    main(["bench", "--models", "lenet300", "lenet5", "--threads", "1", "--json", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["model"] for row in rows] == ["lenet300", "lenet5"]
    assert all("ended with 1" in row["error"] for row in rows)


def test_saved_rows_of_this_machine_are_joined(tmp_path):
    paths = [tmp_path / f"{name}.json" for name in ("one", "other", "all")]
    here = json.loads(json.dumps(machine()))
    for path, model in zip(paths, ("lenet300", "lenet5"), strict=False):
        rows = [{"model": model, "threads": 1, "batch": 1, "density": 0.1, "masks": "random", "error": "none"}]
        path.write_text(json.dumps({"machine": here, "rows": rows}))
    main(["bench", "--saved", *map(str, paths[:2]), "--json", str(paths[2])])
    assert [row["model"] for row in json.loads(paths[2].read_text())["rows"]] == ["lenet300", "lenet5"]
    paths[0].write_text(json.dumps({"machine": here | {"cpu": "another"}, "rows": []}))
    with pytest.raises(SparsefxError, match="one.json: expected times of this machine"):
        command.run(options("--saved", str(paths[0])), reexecute=False)


def test_plot_draws_sweeps(tmp_path):
    rows = [
        {
            "model": "wrn-28-2",
            "threads": 1,
            "masks": "random",
            "batch": batch,
            "density": density,
            "ratio": 2.0,
            "ratio_without_window": 2.2,
            "sparse": {"outside": batch * density},
        }
        for batch in (64, 128)
        for density in (0.05, 0.1)
    ]
    plot([*rows, {"model": "x", "error": "y"}], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
