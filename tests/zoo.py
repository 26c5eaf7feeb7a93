"""Real models and the check that a sparsified one computes what its masked dense copy computes.

`python -m tests.zoo` runs every model and writes the table `results/zoo.md`; models already in it are not run again.
"""

import argparse
import copy
import gc
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only
from torchvision import models
from torchvision.models.optical_flow import raft
from torchvision.ops import StochasticDepth

import sparsefx

DENSITY = 0.1
SHARED_ABOVE = 200_000_000  # parameters from which model and reference share float64 storage
LAYERS = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


@dataclass(frozen=True)
class Case:
    """A model to build and what to call it with: `inputs(training) -> (args, kwargs)`, float64."""

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[bool], tuple[tuple, dict[str, Any]]]


@dataclass
class Row:
    """One line of the table. Errors are ||sparse - masked dense|| / ||masked dense||, the worst of all outputs."""

    model: str
    family: str
    sparse_layers: int = 0
    dense_layers: int = 0
    weights: int = 0
    existing: int = 0
    traced_train: str = ""
    traced_eval: str = ""
    train_float64: float = math.nan
    eval_float64: float = math.nan
    train_float32_ratio: float = math.nan
    eval_float32_ratio: float = math.nan
    seconds: float = 0.0


def rand(*shape: int) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def image(size: int, batch: int = 2) -> Callable[[bool], tuple[tuple, dict[str, Any]]]:
    return lambda training: ((rand(batch, 3, size, size),), {})


def clip(frames: int, size: int, batch: int) -> Callable[[bool], tuple[tuple, dict[str, Any]]]:
    return lambda training: ((rand(batch, 3, frames, size, size),), {})


def classification() -> Iterator[Case]:
    sizes = {"inception_v3": 299, "maxvit_t": 224}
    for name in models.list_models(models):
        size = sizes.get(name, 64)
        kwargs: dict[str, Any] = {}
        if name.startswith("vit"):
            size = 2 * int(name.rsplit("_", 1)[1])
            kwargs["image_size"] = size
        elif name in ("googlenet", "inception_v3"):
            kwargs["init_weights"] = False
        yield Case(name, "classification", lambda n=name, k=kwargs: models.get_model(n, weights=None, **k), image(size))


def segmentation() -> Iterator[Case]:
    for name in models.list_models(models.segmentation):
        build = lambda n=name: models.get_model(n, weights=None, weights_backbone=None)  # noqa: E731
        yield Case(name, "segmentation", build, image(32))


def video() -> Iterator[Case]:
    def smaller_mvit(name: str) -> nn.Module:
        full = models.video.mvit._mvit
        small = lambda **kwargs: full(**kwargs | {"spatial_size": (64, 64), "temporal_size": 8})  # noqa: E731
        with patch.object(models.video.mvit, "_mvit", small):
            return models.get_model(name, weights=None)

    for name in models.list_models(models.video):
        build = smaller_mvit if name.startswith("mvit") else models.get_model
        size = {"s3d": (16, 224, 1), "mvit_v1_b": (8, 64, 2), "mvit_v2_s": (8, 64, 2)}.get(name, (8, 32, 2))
        yield Case(name, "video", lambda b=build, n=name: b(n), clip(*size))


def detection_inputs(size: int) -> Callable[[bool], tuple[tuple, dict[str, Any]]]:
    def inputs(training: bool) -> tuple[tuple, dict[str, Any]]:
        images = list(rand(2, 3, size, size))
        if not training:
            return (images,), {}
        side = float(size)
        keypoints = torch.tensor([[[side / 2, side / 2, 1.0]] * 17], dtype=torch.float64)
        target = {
            "boxes": torch.tensor([[4.0, 4.0, side - 8, side - 4]], dtype=torch.float64),
            "labels": torch.tensor([1]),
            "masks": torch.ones(1, size, size, dtype=torch.uint8),
            "keypoints": keypoints,
        }
        return (images, [target, {key: value.clone() for key, value in target.items()}]), {}

    return inputs


def detection() -> Iterator[Case]:
    for name in models.list_models(models.detection):
        fixed = name.startswith("ssd")
        kwargs: dict[str, Any] = {} if fixed else {"min_size": 96, "max_size": 96}
        if "rcnn" in name:
            kwargs |= {"box_score_thresh": 0.0, "box_detections_per_img": 10}
        if not name.startswith("ssd300"):
            kwargs["trainable_backbone_layers"] = 6 if "mobilenet" in name else 5
        build = lambda n=name, k=kwargs: models.get_model(n, weights=None, weights_backbone=None, **k)  # noqa: E731
        yield Case(name, "detection", build, detection_inputs(320 if fixed else 96))


def optical_flow() -> Iterator[Case]:
    def inputs(training: bool) -> tuple[tuple, dict[str, Any]]:
        pair = rand(2, 3, 128, 128)
        return (pair[:1], pair[1:]), {"num_flow_updates": 2}

    for name in models.list_models(models.optical_flow):
        yield Case(name, "optical flow", lambda n=name: models.get_model(n, weights=None), inputs)


def hugging_face() -> Iterator[Case]:
    def bert() -> nn.Module:
        from transformers import BertConfig, BertForMaskedLM

        config = BertConfig(
            vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        )
        return BertForMaskedLM(config)

    def vit() -> nn.Module:
        from transformers import ViTConfig, ViTForImageClassification

        return ViTForImageClassification(
            ViTConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=64,
                image_size=32,
                patch_size=8,
            )
        )

    tokens = torch.arange(24).reshape(2, 12)
    yield Case("bert", "Hugging Face", bert, lambda training: ((), {"input_ids": tokens}))
    yield Case("vit", "Hugging Face", vit, lambda training: ((), {"pixel_values": rand(2, 3, 32, 32)}))


def small() -> Iterator[Case]:
    """The families whose smallest named model is slow to build, at a size for the default test run."""
    yield Case(
        "densenet (small)",
        "small",
        lambda: models.DenseNet(growth_rate=8, block_config=(2, 3), num_init_features=16, num_classes=10),
        image(32),
    )
    yield Case(
        "convnext (small)",
        "small",
        lambda: models.ConvNeXt(
            [models.convnext.CNBlockConfig(16, 24, 2), models.convnext.CNBlockConfig(24, None, 1)], num_classes=10
        ),
        image(32),
    )
    yield Case(
        "vit (small)",
        "small",
        lambda: models.VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=10),
        image(32),
    )
    for name, block in (("swin", None), ("swin_v2", models.swin_transformer.SwinTransformerBlockV2)):
        merging = models.swin_transformer.PatchMergingV2 if block else models.swin_transformer.PatchMerging
        yield Case(
            f"{name} (small)",
            "small",
            lambda b=block, m=merging: models.SwinTransformer(
                [4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=10, block=b, downsample_layer=m
            ),
            image(32),
        )
    yield Case(
        "lraspp (small)",
        "small",
        lambda: models.segmentation.lraspp._lraspp_mobilenetv3(models.mobilenet_v3_small(), 21),
        image(32),
    )
    yield Case("mobilenet_v2 (small)", "small", lambda: models.MobileNetV2(10, width_mult=0.2), image(32))
    yield Case("efficientnet (small)", "small", small_efficientnet, image(32))
    yield Case(
        "regnet (small)",
        "small",
        lambda: models.RegNet(models.regnet.BlockParams.from_init_params(5, 16, 16.0, 2.0, 8, se_ratio=0.25), 10),
        image(32),
    )
    yield Case(
        "swin3d (small)",
        "video",
        lambda: models.video.SwinTransformer3d([2, 4, 4], 24, [2, 2], [2, 4], [2, 4, 4], num_classes=10),
        clip(4, 32, 2),
    )
    yield Case("retinanet (small)", "detection", small_detector, detection_inputs(64))


def small_efficientnet() -> nn.Module:
    config = models.efficientnet.MBConvConfig
    return models.EfficientNet([config(1, 3, 1, 16, 16, 1), config(4, 3, 2, 16, 24, 2)], 0.0, num_classes=10)


def small_detector() -> nn.Module:
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=4, padding=1)
    )
    backbone.out_channels = 16  # pyright: ignore[reportAttributeAccessIssue]
    anchors = models.detection.anchor_utils.AnchorGenerator(((16, 32),), ((1.0,),))
    return models.detection.RetinaNet(backbone, 5, min_size=64, max_size=64, anchor_generator=anchors)


def cases() -> dict[str, Case]:
    """Every model of the zoo by name."""
    families = (classification, segmentation, video, detection, optical_flow, hugging_face, small)
    return {case.name: case for family in families for case in family()}


def silence_randomness_(model: nn.Module) -> None:
    """Set every dropout and stochastic depth to 0, so that train mode is a function of its input."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd | StochasticDepth):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "dropout_prob"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def excite_(model: nn.Module) -> None:
    """Make every layer count in the output: weights keep their gain under the masks, scales and biases are not 0."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        with torch.no_grad():
            if parameter.dim() > 1 and min(parameter.shape[:2]) > 1:
                parameter.mul_(DENSITY**-0.5)
                continue
            noise = torch.rand(parameter.shape, generator=generator).sub_(0.5)
            if parameter.abs().max() < 1e-3:
                parameter.copy_(noise)
            else:
                parameter.mul_(1 + noise)


def run(model: nn.Module, case: Case, dtype: torch.dtype, memory_format: torch.memory_format | None = None) -> Any:
    args, kwargs = tree_map_only(
        Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, case.inputs(model.training)
    )
    for target in args[1] if case.family == "detection" and model.training else ():
        target["keypoints"] = target["keypoints"].float()  # torchvision takes no other type
    if memory_format is not None:
        args = tree_map_only(Tensor, lambda t: t.to(memory_format=memory_format) if t.dim() > 3 else t, args)
    torch.manual_seed(0)
    with torch.no_grad(), double_grid() if dtype == torch.float64 else nullcontext():
        return model(*args, **kwargs)


def double_grid() -> Any:
    """Let RAFT run in float64: its grid of coordinates is float32 whatever its weights are."""
    grid = raft.make_coords_grid
    return patch.object(raft, "make_coords_grid", lambda *args, **kwargs: grid(*args, **kwargs).double())


def relative_error(ours: Any, expected: Any) -> float:
    """Return the largest ||a - b|| / ||b|| over all tensors of two outputs; what is not a float must be equal."""
    a_leaves, a_spec = tree_flatten(ours)
    b_leaves, b_spec = tree_flatten(expected)
    if str(a_spec) != str(b_spec):
        return math.inf
    worst = 0.0
    for a, b in zip(a_leaves, b_leaves, strict=True):
        if not isinstance(b, Tensor):
            worst = worst if a == b else math.inf
        elif a.shape != b.shape or a.dtype != b.dtype:
            return math.inf
        elif not b.is_floating_point():
            worst = worst if torch.equal(a, b) else math.inf
        elif b.numel():
            difference = torch.linalg.vector_norm(a.double() - b.double())
            error = (difference / torch.linalg.vector_norm(b.double())).item() if difference else 0.0
            worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def compare(model: nn.Module, reference: nn.Module, case: Case, dtype: torch.dtype) -> float:
    """Return the worst error of two calls (the first may verify the graph), in float64 also of the buffers they leave.

    Both start from the reference's buffers, so that rounding of an earlier comparison is not carried into this one.
    """
    worst = 0.0
    buffers = dict(model.named_buffers())
    for name, value in reference.named_buffers():
        buffers[name].copy_(value)
    for _ in range(2):
        expected = run(reference, case, dtype)
        worst = max(worst, relative_error(run(model, case, dtype), expected))
    if dtype == torch.float64:
        buffers = dict(model.named_buffers())
        worst = max([worst, *(relative_error(buffers[name], value) for name, value in reference.named_buffers())])
    return worst


def own_difference(reference: nn.Module, case: Case) -> float:
    """Return the error between the dense model's fp32 outputs in NCHW and channels_last."""
    buffers = [(value, value.clone()) for value in reference.buffers()]
    expected = run(reference, case, torch.float32)
    for value, before in buffers:
        value.copy_(before)
    format_ = torch.channels_last_3d if case.family == "video" else torch.channels_last
    other = copy.deepcopy(reference).to(memory_format=format_)  # pyright: ignore[reportCallIssue]
    return relative_error(run(other, case, torch.float32, format_), expected)


def traced_or_why(model: nn.Module) -> str:
    """Say whether the model's present mode runs a traced graph, and why modules keep their own forward."""
    own = [(row.name, row.reason) for row in sparsefx.summary(model).rows if row.status == "own forward"]
    if not own:
        return "yes"
    if own[0][0] == "":
        return f"no: {own[0][1]}"
    return f"but {len(own)} modules: " + "; ".join(dict.fromkeys(reason for _, reason in own))


def check(case: Case, float32: bool = True) -> Row:
    """Sparsify one model and compare it with its masked dense copy, in train and eval mode.

    Detection is compared in float64 only: which boxes it keeps is no continuous function of rounding.

    Raises:
        AssertionError: a wrong count, a stored weight outside its mask, or a mask of an unknown weight.
    """
    start = time.perf_counter()
    torch.manual_seed(0)
    model = case.build()
    silence_randomness_(model)
    excite_(model)
    reference = copy.deepcopy(model)
    row = Row(case.name, case.family)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparse = sparsefx.sparsify(model, DENSITY, seed=0)
        assert sparse is model
        masks = sparsefx.masks(model)
        check_masks_(model, reference, masks)
        row.weights = sum(mask.numel() for mask in masks.values())
        row.existing = sum(int(mask.sum()) for mask in masks.values())
        layers = [name for name, module in reference.named_modules() if isinstance(module, LAYERS)]
        row.sparse_layers = sum(f"{name}.weight" in masks for name in layers)
        row.dense_layers = len(layers) - row.sparse_layers
        if float32 and case.family != "detection":
            row.train_float32_ratio, row.eval_float32_ratio = (
                ratio(compare(model.train(mode), reference.train(mode), case, torch.float32), reference, case)
                for mode in (True, False)
            )
        to_float64_(model, reference)
        row.train_float64 = compare(model.train(), reference.train(), case, torch.float64)
        row.traced_train = traced_or_why(model)
        row.eval_float64 = compare(model.eval(), reference.eval(), case, torch.float64)
        row.traced_eval = traced_or_why(model)
    row.seconds = time.perf_counter() - start
    return row


def ratio(error: float, reference: nn.Module, case: Case) -> float:
    """Return an fp32 error over the dense model's own difference between memory formats (at least one rounding)."""
    return error / max(own_difference(reference, case), torch.finfo(torch.float32).eps)


def check_masks_(model: nn.Module, reference: nn.Module, masks: dict[str, Tensor]) -> None:
    """Assert the exact count and that stored weights are the old ones times the masks, then mask the reference."""
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == round(DENSITY * total)
    parameters, dense = dict(model.named_parameters()), dict(reference.named_parameters())
    assert parameters.keys() == dense.keys()
    with torch.no_grad():
        for name, mask in masks.items():
            if name in dense:
                dense[name].mul_(mask)
        for name, parameter in parameters.items():
            assert torch.equal(parameter, dense[name]), name


def to_float64_(model: nn.Module, reference: nn.Module) -> None:
    if sum(parameter.numel() for parameter in model.parameters()) > SHARED_ABOVE:
        for parameter in reference.parameters():
            parameter.data = torch.empty(0)
        model.double()
        dense = dict(reference.named_parameters())
        for name, parameter in model.named_parameters():
            dense[name].data = parameter.data
    else:
        model.double()
    reference.double()


def line(row: Row) -> str:
    def cell(value: Any) -> str:
        return f"{value:.2g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", " ")

    return "| " + " | ".join(cell(getattr(row, f.name)) for f in fields(Row)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Check every model of the zoo and write the table.")
    parser.add_argument("models", nargs="*", help="only these models")
    parser.add_argument("--out", type=Path, default=Path("results/zoo.md"))
    arguments = parser.parse_args()
    zoo = cases()
    if not arguments.out.exists():
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        head = [f.name.replace("_", " ") for f in fields(Row)]
        arguments.out.write_text(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}\n")
    done = {text.split("|")[1].strip() for text in arguments.out.read_text().splitlines() if text.startswith("| ")}
    for name in arguments.models or [name for name in zoo if "(small)" not in name]:
        if name in done:
            continue
        try:
            text = line(check(zoo[name]))
        except Exception as error:  # one broken model must not hide the others
            text = line(Row(name, zoo[name].family, traced_train=f"FAILED: {type(error).__name__}: {error}"))
        with arguments.out.open("a") as table:
            table.write(text + "\n")
        print(text, flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
