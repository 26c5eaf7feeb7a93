"""Segments: programs of layers give the numbers of the layers one by one, and give way where something else is due."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsefx
from sparsefx.graph import segments
from sparsefx.specialize import Specializer
from tests.graph.region_nets import NETS, Net, in_regions, pair, relative

__all__ = ["in_regions"]
pytestmark = pytest.mark.usefixtures("in_regions")
X = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
WIDTH = 16


class Block(nn.Module):
    """Branches that part at a norm and at its input: forks, residuals, a pooling, biases, a ReLU of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.norm2, self.conv2 = nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.pool, self.skip = nn.MaxPool2d(2), nn.Conv2d(WIDTH, WIDTH, 1, stride=2)
        self.norm3, self.norm4 = nn.BatchNorm2d(WIDTH), nn.BatchNorm2d(WIDTH, affine=False)
        self.conv3, self.norm5 = nn.Conv2d(WIDTH, WIDTH, 3, 2, 1), nn.BatchNorm2d(WIDTH, track_running_stats=False)

    def forward(self, x):
        y = F.relu(self.norm1(x))
        y = x + self.conv2(F.relu(self.norm2(self.conv1(y))))
        y = F.relu(self.norm3(self.pool(y)) + self.norm4(self.skip(y)))
        return F.relu(self.norm5(F.relu(self.conv3(y)) + self.conv3(y)))


def net() -> nn.Module:
    torch.manual_seed(0)
    made = Net(Block(), WIDTH)
    made.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
    return made


class Ran(list):
    """The programs that ran."""


@pytest.fixture
def ran(monkeypatch) -> Ran:
    found, run = Ran(), segments.Program.run

    def noted(self, tensors):
        found.append(self)
        return run(self, tensors)

    monkeypatch.setattr(segments.Program, "run", noted)
    return found


@pytest.fixture
def one_by_one(monkeypatch):
    """Let programs run, or not."""

    def switch(on: bool) -> None:
        monkeypatch.setattr(segments, "_observed", lambda: on)

    return switch


def sparse(training: bool = True, **options):
    model = sparsefx.sparsify(net(), 0.4, example_inputs=X, **options)
    return model.train(training)


def settled(model, x=X):
    """The model after each kernel has been chosen."""
    before = copy.deepcopy({k: v for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)})
    for _ in range(3):
        out = model(x.clone().requires_grad_())
        if out.requires_grad:
            out.sum().backward()
    model.load_state_dict(before, strict=False)
    model.zero_grad()
    return model


def step(model, x):
    x = x.clone().requires_grad_()
    out = model(x)
    out.square().sum().backward()
    return [out.detach(), x.grad, *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]


def assert_same(ones, others):
    assert len(ones) == len(others)
    for one, other in zip(ones, others, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("images", [1, 16, 37])
@pytest.mark.parametrize("training", [True, False])
def test_a_program_gives_the_same_bits(ran, one_by_one, images, training):
    x, found = torch.randn(images, 3, 8, 8), []
    for on in (False, True):
        one_by_one(on)
        model = settled(sparse(training), x)
        ran.clear()
        found.append(step(model, x))
        assert bool(ran) is not on
    assert_same(*found)


def test_a_network_in_channels_last_is_one_program(ran, one_by_one):
    """Its 1x1 convolution's weight and mask lie alike, with other strides."""
    found = []
    for on in (True, False):
        one_by_one(on)
        model = sparsefx.sparsify(net().to(memory_format=torch.channels_last), 0.4, example_inputs=X)
        skip = model.body.skip
        assert skip.weight.stride() != skip.weight_mask.stride()
        settled(model)
        ran.clear()
        found.append(step(model, X))
    assert len(ran) == 1
    assert_same(*found)


@pytest.mark.parametrize("training", [True, False])
def test_without_gradients_memory_is_shared_and_the_bits_are_the_same(ran, one_by_one, training):
    found = []
    for on in (False, True):
        one_by_one(on)
        model = settled(sparse(training))
        ran.clear()
        with torch.no_grad():
            found.append([model(X), *(b.clone() for b in model.buffers())])
        if not on:
            settled(model)
            without, *_, within = (program.segment.forward.arena for program in ran)
            assert without < 0.8 * within
    assert_same(*found)
    one_by_one(False)
    with torch.no_grad():
        wanted = model(X)
    ran.clear()
    with torch.inference_mode():
        out = model(X)
        assert out.is_inference()
        assert training or torch.equal(out, wanted)
    assert ran


def test_the_window_collects_the_same_gradients(ran, one_by_one):
    found = []
    for on in (False, True):
        one_by_one(on)
        model = sparse(scheduler=sparsefx.SparseMomentum(dense_grad_window="always"))
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        model.scheduler.attach(optimizer, steps_per_update=3, total_steps=100)
        ran.clear()
        for _ in range(7):
            for part in X.split(10):
                model(part).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert bool(ran) is not on
        moments = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
        found.append([*model.parameters(), *sparsefx.masks(model).values(), *moments])
        assert len(model.scheduler.history) == 2
    assert_same(*found)


def test_steps_into_and_out_of_the_window(ran, one_by_one):
    found = []
    for on in (False, True):
        one_by_one(on)
        model = sparse(scheduler=sparsefx.SparseMomentum(dense_grad_window=2))
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        model.scheduler.attach(optimizer, steps_per_update=5, total_steps=100)
        for _ in range(12):
            model(X).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([*model.parameters(), *sparsefx.masks(model).values()])
    assert_same(*found)
    assert len({id(program) for program in ran}) >= 3  # new masks, new programs


def test_two_forwards_a_pass_without_gradients_and_retained_graphs(ran, one_by_one):
    found = []
    for on in (False, True):
        one_by_one(on)
        model = settled(sparse())
        ones, others = X.clone().requires_grad_(), (X + 1).requires_grad_()
        one, other = model(ones), model(others)
        with torch.no_grad():
            model(X * 2)
        other.sum().backward(retain_graph=True)
        one.sum().backward()
        other.square().sum().backward()
        found.append([ones.grad, others.grad, *(p.grad for p in model.parameters())])
    assert_same(*found)
    assert ran


def test_a_layer_called_twice(ran):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)

        def forward(self, x):
            return self.norm(self.conv(F.relu(self.norm(self.conv(x)))))

    made = Net(Twice(), WIDTH)
    made.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
    model, twin = pair(made, X)
    for _ in range(3):
        model.zero_grad()
        twin.zero_grad()
        model(X).square().sum().backward()
        twin(X.double()).square().sum().backward()
    mask = sparsefx.masks(model)["body.conv.weight"]
    assert relative(model.body.conv.weight.grad, twin.body.conv.weight.grad * mask) < 1e-5
    assert relative(model.body.norm.running_var, twin.body.norm.running_var) < 1e-5
    assert model.body.norm.num_batches_tracked == 2 * (model.body.norm.num_batches_tracked // 2)
    assert ran


def test_double_backward_is_that_of_the_layers_and_moves_no_statistics(ran, one_by_one):
    found = []
    for on in (False, True):
        one_by_one(on)
        model = settled(sparse())
        x = X.clone().requires_grad_()
        out = model(x).square().sum()
        before = [b.clone() for b in model.buffers()]
        (grad,) = torch.autograd.grad(out, x, create_graph=True)
        assert_same(before, list(model.buffers()))
        grad.square().sum().backward()
        found.append([grad.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    assert ran


def test_frozen_layers_and_norms_in_eval_mode(ran, one_by_one):
    found = []
    for on in (False, True):
        one_by_one(on)
        model = sparse()
        model.body.norm2.eval()
        for frozen in (model.stem.weight, model.body.conv2.weight, model.body.norm3.bias, model.body.conv1.bias):
            frozen.requires_grad_(False)
        settled(model)
        ran.clear()
        found.append(step(model, X))
        assert bool(ran) is not on
    assert_same(*found)


def test_a_mask_written_past_its_version_is_seen(ran):
    model, twin = settled(sparse()), copy.deepcopy(net()).double()
    model(X)
    assert ran
    mask = model.body.conv2.weight_mask
    mask.data.copy_(torch.rand_like(mask, dtype=torch.float32) < 0.5)
    model.body.conv2.zero_missing_()
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if not k.endswith("_mask")})
    for x in (X, X[:7]):
        assert relative(model.eval()(x), twin.eval()(x.double())) < 1e-5


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.body.norm1, "momentum", 0.5),
        lambda m: setattr(m.body.norm1, "momentum", None),
        lambda m: setattr(m.body.norm1, "eps", 0.1),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.body.norm1.register_buffer("running_mean", torch.ones(WIDTH)),
        lambda m: m.body.conv1.weight.requires_grad_(False),
        lambda m: m.double(),
    ],
)
def test_a_layer_that_is_no_longer_as_it_was(one_by_one, change):
    found = []
    for on in (False, True):
        one_by_one(on)
        model = settled(sparse())
        change(model)
        x = X.to(model.stem.weight.dtype)
        found.append([t for _ in range(3) for t in step(model, x)])
        model.zero_grad()
    assert_same(*found)


def test_a_weight_changed_between_the_passes_is_an_error(ran):
    model = settled(sparse())
    loss = model(X).sum()
    with torch.no_grad():
        model.body.conv1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert ran


def test_autocast_and_several_ranks_run_layer_by_layer(ran, monkeypatch):
    model = settled(sparse())
    ran.clear()
    with torch.autocast("cpu", torch.bfloat16):
        model(X).float().sum().backward()
    assert not ran
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model(X).sum().backward()
    assert not ran


def test_segments_can_be_turned_off(ran, monkeypatch):
    model = settled(sparse())
    ran.clear()
    monkeypatch.setattr(segments, "_OFF", True)
    model(X).sum().backward()
    assert not ran


def test_dense_layers_stand_alone_until_their_masks_change(ran, monkeypatch):
    """A layer that runs dense cuts the program in two; a new mask may join it again."""
    dense = {"body.conv2"}

    def choose(self, plan, key, spec, weight, call):
        layer = next(n for n, m in model.named_modules() if getattr(m, "weight_mask", None) is not None and
                     self._plans.get(m.handle) is plan)  # fmt: skip
        return "dense" if layer in dense else "sparse"

    model = sparsefx.sparsify(net(), 0.4)
    monkeypatch.setattr(type(model.scheduler.specializer), "_choose", choose)
    for _ in range(3):
        ran.clear()
        model(X).sum().backward()
    assert len(ran) == 2
    dense.clear()
    model.body.conv2.set_mask_(torch.rand_like(model.body.conv2.weight) < 0.3)
    for _ in range(4):
        ran.clear()
        model(X).sum().backward()
    assert len(ran) == 1


@pytest.mark.parametrize("kind", sorted(NETS))
def test_other_networks_give_the_same_bits(one_by_one, kind):
    found = []
    for on in (False, True):
        one_by_one(on)
        torch.manual_seed(0)
        model = sparsefx.sparsify(NETS[kind](), 0.4, example_inputs=X)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        found.append([t for _ in range(3) for t in step(model, X)])
    assert_same(*found)


def test_a_program_keeps_no_more_than_the_layers_do(ran, one_by_one):
    held = []
    for on in (False, True):
        one_by_one(on)
        model = settled(sparse())
        gc.collect()
        saved: dict[int, int] = {}

        def keep(t, saved=saved):
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            loss = model(X).sum()
        loss.backward()
        held.append(sum(saved.values()))
    assert held[0] <= held[1] * 1.05
    assert ran


class Chain(nn.Module):
    """Linear layers with ReLUs of several kinds, one of them read twice."""

    def __init__(self, features: int = 20) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(features, 24), nn.Linear(24, 17, bias=False)
        self.three, self.head, self.act = nn.Linear(17, 17), nn.Linear(17, 5), nn.ReLU()

    def forward(self, x):
        y = self.act(self.two(F.relu(self.one(x))))
        return self.head(torch.relu(self.three(y)) + y)


@pytest.fixture(params=["sparse", "joined dense"])
def chained(monkeypatch, request) -> str:
    """The graph of linear layers with sparse kernels, or with dense ones, wherever there is one."""
    monkeypatch.setattr(
        Specializer, "choose_graph", lambda self, key, calls: request.param if request.param in calls else "layers"
    )
    return request.param


@pytest.mark.parametrize("rows", [1, 4, 5, 37])
def test_a_chain_of_linear_layers_gives_the_same_bits(ran, one_by_one, chained, rows):
    x, found = torch.randn(rows, 20), []
    for on in (False, True):
        one_by_one(on)
        torch.manual_seed(0)
        model = sparsefx.sparsify(Chain(), 0.3, example_inputs=x)
        steps = []
        for _ in range(3):
            model.zero_grad()
            given = x.clone().requires_grad_()
            out = model(given)
            out.square().sum().backward()
            steps += [out.detach(), given.grad, *(p.grad.clone() for p in model.parameters())]
        with torch.no_grad():
            steps.append(model(x))
        found.append(steps)
        assert bool(ran) is not on
        ran.clear()
    assert_same(*found)
    twin = Chain()
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if not k.endswith("_mask")})
    assert relative(found[1][-1], twin.double()(x.double())) < 1e-5
    assert model.scheduler.specializer.graph == chained
    assert str(sparsefx.summary(model)).count("/".join([chained.split()[-1]] * 3)) == 4


def test_a_chain_trains_through_windows_as_layer_by_layer(ran, one_by_one, chained):
    found = []
    for on in (False, True):
        one_by_one(on)
        torch.manual_seed(0)
        model = sparsefx.sparsify(
            Chain(), 0.3, example_inputs=torch.randn(8, 20), scheduler=sparsefx.SparseMomentum(dense_grad_window=2)
        )
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        model.scheduler.attach(optimizer, steps_per_update=4, total_steps=100)
        for _ in range(14):
            for part in torch.randn(16, 20).split(8):
                model(part).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append([*model.parameters(), *sparsefx.masks(model).values()])
        assert len(model.scheduler.history) == 3
    assert_same(*found)
    assert ran


def test_inputs_that_a_chain_does_not_take(chained):
    model = sparsefx.sparsify(Chain(), 0.3, example_inputs=torch.randn(8, 20)).eval()
    x = torch.randn(2, 3, 20)
    assert torch.allclose(model(x), model(x.flatten(0, 1)).view(2, 3, 5), atol=1e-6)
    half = torch.randn(8, 20)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(half).dtype == torch.bfloat16
    assert model.double()(half.double()).dtype == torch.float64


def test_what_one_size_of_inputs_runs_dense_does_not_cut_another(ran, monkeypatch):
    def choose(self, plan, key, spec, weight, call):
        return "dense" if key[1][0] > 2 and plan is self._plans.get(model.body.conv2.handle) else "sparse"

    model = sparsefx.sparsify(net(), 0.4)
    monkeypatch.setattr(type(model.scheduler.specializer), "_choose", choose)
    programs = []
    for x in (X, X, X, X.repeat(2, 1, 1, 1), X.repeat(2, 1, 1, 1), X.repeat(2, 1, 1, 1), X):
        ran.clear()
        model(x).sum().backward()
        programs.append(len(ran))
    assert programs[2] == programs[-1] == 1
    assert programs[-2] == 2


def test_hooks_that_round_or_move_what_is_saved(ran):
    """They see inputs and parameters as numbers, and the rest as bytes, which may come back elsewhere."""
    model = settled(sparse())
    wanted = step(model, X)
    model = settled(sparse())
    ran.clear()

    def pack(t):
        return t.clone() if t.dtype == torch.uint8 else t.to(torch.float64)

    def unpack(t):
        return t if t.dtype == torch.uint8 else t.to(torch.float32)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        found = step(model, X)
    assert ran
    assert_same(found, wanted)
