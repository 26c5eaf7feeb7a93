"""Reference results in float64, and layouts written the slow way."""

import pytest
import torch

from sparsefx.kernels.cpu.build import supported_isas


@pytest.fixture(autouse=True)
def _few_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request):
    if request.param not in supported_isas():
        pytest.skip(f"this processor has no {request.param}")
    return request.param
