"""A model in other processes and under other thread counts: a forked loader, a team that follows torch's."""

import pytest
import torch
from torch import nn

import sparsefx
from sparsefx.kernels.cpu.abi import load


class Scored(torch.utils.data.Dataset):
    """Images with the model's output, computed where the item is made."""

    def __init__(self, model, images):
        self.model, self.images = model, images

    def __len__(self):
        return len(self.images)

    @torch.no_grad()
    def __getitem__(self, index):
        return self.model(self.images[index : index + 1])[0]


def net():
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 64, 10),
    )
    return sparsefx.sparsify(model, 0.1)


@pytest.mark.parametrize("called_before", [True, False])
def test_a_forked_loader_worker_runs_the_model(called_before):
    torch.set_num_threads(2)
    model, images = net().eval(), torch.randn(4, 3, 8, 8)
    if called_before:
        model(images[:1])
    loader = torch.utils.data.DataLoader(
        Scored(model, images), num_workers=1, batch_size=2, multiprocessing_context="fork", timeout=60
    )
    there = torch.cat(list(loader))
    with torch.no_grad():
        here = torch.cat([model(x[None]) for x in images])
    assert (there - here).norm() <= 1e-5 * here.norm()


def test_the_team_follows_torchs_at_each_call(monkeypatch):
    library, teams = load(), []
    model = nn.Linear(200, 100)
    sparsefx.sparsify(model, 0.1)
    monkeypatch.setattr("sparsefx.specialize.interleaved", lambda calls, device: list(range(len(calls), 0, -1)))
    x = torch.randn(64, 200)
    names = ("sfx_linear_gather", "sfx_linear_wgrad")
    for name in names:
        call = getattr(library, name)
        monkeypatch.setattr(
            library, name, lambda *args, call=call, name=name: (teams.append((name, args[-1])), call(*args))[1]
        )
    for threads in (1, 2, 1, 3):
        torch.set_num_threads(threads)
        teams.clear()
        model(x).sum().backward()
        assert set(teams) == {(name, threads) for name in names}
