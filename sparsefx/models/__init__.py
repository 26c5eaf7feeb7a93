"""The paper's networks."""

from sparsefx.models.alexnet import AlexNet
from sparsefx.models.lenet import LeNet5Caffe, LeNet300
from sparsefx.models.vgg import VGG16
from sparsefx.models.wrn import WideResNet

__all__ = ["VGG16", "AlexNet", "LeNet5Caffe", "LeNet300", "WideResNet"]
