"""Real models compute after `sparsify` what their masked dense copies compute, in train and eval mode."""

from importlib.util import find_spec

import pytest

from tests import zoo

CASES = zoo.cases()
SMALL = [name for name in CASES if "(small)" in name]
QUICK = ["resnet18", "shufflenet_v2_x0_5", "squeezenet1_1", "raft_small", *SMALL]


def check(name: str, float32: bool) -> None:
    row = zoo.check(CASES[name], float32)
    assert row.existing == round(zoo.DENSITY * row.weights)
    assert row.sparse_layers > 0
    assert row.train_float64 <= 1e-9
    assert row.eval_float64 <= 1e-9
    if float32 and row.family != "detection":
        assert row.train_float32_ratio <= 10
        assert row.eval_float32_ratio <= 10


@pytest.mark.parametrize("name", QUICK)
def test_a_dozen_models_equal_their_masked_dense_copies(name: str) -> None:
    check(name, float32=CASES[name].family == "small")


@pytest.mark.zoo
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", [name for name in CASES if name not in (*SMALL, "bert", "vit")])
def test_every_model_equals_its_masked_dense_copy(name: str) -> None:
    check(name, float32=True)


@pytest.mark.zoo
@pytest.mark.skipif(find_spec("transformers") is None, reason="needs Hugging Face transformers")
@pytest.mark.parametrize("name", ["bert", "vit"])
def test_hugging_face_models_equal_their_masked_dense_copies(name: str) -> None:
    check(name, float32=True)
