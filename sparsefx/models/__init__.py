"""The paper's networks."""

from sparsefx.models.lenet import LeNet5Caffe, LeNet300

__all__ = ["LeNet5Caffe", "LeNet300"]
