"""The CUDA side of the command line where there is no CUDA device."""

import pytest
import torch

from sparsefx.__main__ import main
from sparsefx.bench.cuda import toy_step
from sparsefx.errors import SparsefxError

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where no CUDA device is")


@without_cuda
@pytest.mark.parametrize("words", [["bench", "--device", "cuda"], ["tune"]])
def test_without_a_device_the_command_says_what_it_needs(words):
    with pytest.raises(SparsefxError, match="expected a CUDA device, got none"):
        main(words)


def test_a_training_step_with_interpreted_gpu_kernels_equals_masked_dense():
    assert toy_step() < 1e-5
