"""What only a CUDA device can show: compiled kernels, captured graphs, training."""

import pytest
import torch

import sparsefx
from sparsefx.kernels.gpu.cases import draw, exact, inner, outer, plan_of, sparse_calls, tensors
from sparsefx.kernels.gpu.timing import captured, fp32_precision
from sparsefx.kernels.layer import Layer
from tests.kernels.gpu.helpers import error

pytestmark = pytest.mark.gpu
LAYERS = [
    Layer("3x3", 96, 40, 3, 9, 37),
    Layer("3x3/2", 64, 32, 3, 16, 128, 2),
    Layer("1x1", 80, 200, 1, 7, 64),
    Layer("linear", 130, 500, 1, 0, 100),
]
TOLERANCE = {"ieee": 1e-5, "tf32": 2e-3, "fp16": 2e-3, "bf16": 1e-2}
TYPES = {"ieee": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("masks", ["random", "h8", "h16", "h64"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_passes_equal_dense(layer, masks, precision):
    t = tensors(layer, draw(layer, masks, 0.1, torch.device("cuda")), TYPES[precision])
    plan = plan_of(layer, t)
    with fp32_precision("tf32" if precision == "tf32" else "ieee"):
        for kind in ("fprop", "dgrad", "wgrad"):
            got = sparse_calls(layer, t, plan, kind, borders=False)["chwn"]()
            got = got if kind == "wgrad" else outer(layer, got)
            assert error(got, exact(layer, t, kind)) < TOLERANCE[precision], kind


def test_a_captured_graph_follows_mask_updates():
    layer = LAYERS[0]
    t = tensors(layer, draw(layer, "h16", 0.1, torch.device("cuda")), torch.float32)
    plan = plan_of(layer, t)
    weight = torch.randn_like(t.weight)
    x, out = inner(layer, t.x), torch.empty(0)

    def call():
        nonlocal out
        out = plan.fprop(x, weight)

    replay = captured(call)
    mask = draw(layer, "h16", 0.3, torch.device("cuda"))
    plan.update_(mask)
    weight.mul_(mask)
    replay()
    want = exact(layer, t._replace(weight=weight, mask=mask), "fprop")
    assert error(outer(layer, out), want) < 1e-5


def test_a_captured_graph_follows_the_window_flag():
    layer = LAYERS[1]
    t = tensors(layer, draw(layer, "h16", 0.1, torch.device("cuda")), torch.float32)
    plan, flag = plan_of(layer, t), torch.zeros(1, dtype=torch.int32, device="cuda")
    x, grad, out = inner(layer, t.x), inner(layer, t.grad), torch.full_like(t.weight, 7)
    replay = captured(lambda: plan.dense_wgrad_(grad, x, flag, out))
    replay()
    assert (out == 7).all()
    flag.fill_(1)
    replay()
    full = t._replace(mask=torch.ones_like(t.mask))
    assert error(out, exact(layer, full, "wgrad")) < 1e-5


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_training_on_cuda_follows_masked_dense(mode):
    def losses(device):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 64, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(64, 64, 3, 2, 1), torch.nn.ReLU(),
            torch.nn.Flatten(), torch.nn.Linear(64 * 16, 10),
        )  # fmt: skip
        x, y = torch.randn(64, 3, 8, 8).to(device), torch.randint(10, (64,)).to(device)
        model = sparsefx.sparsify(net.to(device), density=0.2, granularity=("column", 16), seed=0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        model.scheduler.attach(optimizer, steps_per_update=4, total_steps=100)
        run = torch.compile(model, mode=mode) if device == "cuda" else model
        found = []
        for _ in range(12):
            loss = torch.nn.functional.cross_entropy(run(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return torch.tensor(found)

    with fp32_precision("ieee"):
        assert torch.allclose(losses("cuda"), losses("cpu"), rtol=1e-3)
