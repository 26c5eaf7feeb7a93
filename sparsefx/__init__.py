"""Sparse training that is really faster: a torch.fx compiler with sparse momentum."""

from sparsefx import distributed
from sparsefx.algorithms import SparseMomentum
from sparsefx.api import masks, sparsify
from sparsefx.checkpoint import load_dense
from sparsefx.graph.compact import compact
from sparsefx.summary import Row, Summary, summary

__all__ = ["Row", "SparseMomentum", "Summary", "compact", "distributed", "load_dense", "masks", "sparsify", "summary"]
