"""Benchmarks of whole networks: training steps, inference and memory, against the best dense baseline."""

from sparsefx.bench.model import Request, bench_model
from sparsefx.bench.settings import SETTINGS, Setting
from sparsefx.bench.trainers import Masks

__all__ = ["SETTINGS", "Masks", "Request", "Setting", "bench_model"]
