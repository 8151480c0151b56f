"""The small parts on their own: finiteness, manifest, gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_moe_ext.merging.manifest import check_against, manifest_of
from mergekit_moe_ext.merging.tasks import is_finite
from tests.conftest import make_model


@settings(deadline=None)
@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True, width=16), max_size=40),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_is_finite(values, dtype):
    tensor = torch.tensor(values, dtype=dtype)
    assert is_finite(tensor) == all(v == v and abs(v) != float("inf") for v in tensor.tolist())


def test_is_finite_of_what_has_no_extremes():
    assert is_finite(torch.empty(0, 3))
    assert is_finite(torch.tensor([1, 2]))
    assert is_finite(torch.ones(4, 6)[:, ::2])
    assert not is_finite(torch.tensor(float("nan")))


@pytest.mark.parametrize("tied", [False, True])
def test_the_manifest_is_what_save_pretrained_writes(tmp_path, tied):
    from transformers import MixtralConfig, MixtralForCausalLM

    from tests.conftest import TINY, read_tensors

    model = MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=3, tie_word_embeddings=tied))
    model.save_pretrained(tmp_path)
    manifest = manifest_of(model.config)
    assert dict(manifest.shapes) == {name: tuple(t.shape) for name, t in read_tensors(tmp_path).items()}
    assert manifest.tied == ({"lm_head.weight"} if tied else set())
    embeddings = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert manifest.vocabulary == embeddings


def test_a_plan_that_is_not_the_manifest_is_refused(tmp_path):
    from transformers import AutoConfig

    manifest = manifest_of(AutoConfig.from_pretrained(make_model(tmp_path, 0)))
    check_against(manifest, manifest.shapes)
    for change in ({"model.norm.weight": (1,)}, {"more": (1,)}):
        with pytest.raises(ValueError, match=next(iter(change))):
            check_against(manifest, {**manifest.shapes, **change})
    fewer = {name: shape for name, shape in manifest.shapes.items() if name != "model.norm.weight"}
    with pytest.raises(ValueError, match=r"model\.norm\.weight comes from nowhere"):
        check_against(manifest, fewer)
