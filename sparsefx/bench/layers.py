"""The layers of a network, as the layer benchmark times them."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsefx.bench.settings import SETTINGS, Setting
from sparsefx.bench.trainers import density_of, load
from sparsefx.kernels.layer import Layer
from sparsefx.layers import MASK


def layers_of(setting: Setting, batch: int, density: float) -> dict[str, Layer]:
    """Layers by the name of their module; of equal ones the first. Grouped and uneven convolutions are left out."""
    model = setting.make().eval()
    seen: dict[str, tuple[nn.Module, tuple[int, ...]]] = {}

    def note(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[name] = module, tuple(inputs[0].shape)

    for name, module in model.named_modules():
        if type(module) in (nn.Conv2d, nn.Linear):
            module.register_forward_pre_hook(partial(note, name))
    with torch.no_grad():
        model(setting.data(2)[0])
    found: dict[str, Layer] = {}
    for name, (module, shape) in seen.items():
        if isinstance(module, nn.Linear):
            layer = Layer("", module.out_features, module.in_features, 1, 0, batch, density=density)
        elif isinstance(module, nn.Conv2d) and _even(module, shape):
            kernel, stride = module.kernel_size[0], module.stride[0]
            layer = Layer("", module.out_channels, module.in_channels, kernel, shape[2], batch, stride, density)
        else:
            continue
        if layer not in found.values():
            found[name] = layer
    return {name: Layer(f"{setting.name} {name}", *_fields(layer)) for name, layer in found.items()}


def trained_layers(checkpoint: Path) -> tuple[list[Layer], dict[str, Tensor]]:
    """Layers of the network of a checkpoint, and their masks by the layer's name."""
    saved = load(checkpoint)
    setting = SETTINGS[saved["model"]]
    layers = layers_of(setting, setting.batch, density_of(saved["state_dict"], checkpoint))
    masks = {layer.name: saved["state_dict"].get(f"{name}.{MASK}") for name, layer in layers.items()}
    return list(layers.values()), {name: mask for name, mask in masks.items() if mask is not None}


def _even(module: nn.Conv2d, shape: tuple[int, ...]) -> bool:
    kernel, stride = module.kernel_size, module.stride
    return (
        module.groups == 1
        and kernel[0] == kernel[1]
        and stride[0] == stride[1]
        and module.padding == (kernel[0] // 2, kernel[0] // 2)
        and module.dilation == (1, 1)
        and shape[2] == shape[3]
    )


def _fields(layer: Layer) -> tuple:
    return layer.out, layer.inputs, layer.kernel, layer.size, layer.batch, layer.stride, layer.density
