"""Activations are counted by storage, and neither weights nor the batch are among them."""

import torch
from torch import nn

from sparsefx.bench import Masks, Setting
from sparsefx.bench.memory import activation_bytes, heap_in_use, sparse_bytes
from sparsefx.bench.trainers import Trainer, sparse


class Net(nn.Module):
    """Saves one hidden map `[8, 6, 5, 5]` twice."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.conv1(x)
        return (self.conv2(x) + self.conv3(x)).mean((2, 3))


def test_a_storage_counts_once_and_weights_and_batch_not_at_all():
    data = torch.randn(8, 3, 5, 5), torch.zeros(8, dtype=torch.long)
    hidden, probabilities, weight_of_the_loss = 8 * 6 * 25 * 4, 8 * 2 * 4, 4
    assert activation_bytes(Trainer(Net(), data)) == hidden + probabilities + weight_of_the_loss


def test_masks_lists_and_collected_gradients():
    setting = Setting("tiny", lambda: nn.Sequential(nn.Flatten(), nn.Linear(300, 10)), (3, 10, 10), 4, 0.1)
    trainer = sparse(setting, 4, 0.1, Masks(), interval=3, inside=True)
    trainer.step()
    found = sparse_bytes(trainer)
    assert found["masks"] == 2 * 3000
    assert found["collected"] == 4 * 3000
    assert (found["lists"] is None) == (heap_in_use() is None)
