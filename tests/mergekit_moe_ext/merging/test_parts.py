"""The small parts on their own: finiteness, manifest, plan, layers."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference
from mergekit.io.tasks import LoadTensor
from mergekit.options import MergeOptions
from transformers import LlamaConfig

from _mergekit_moe_ext_common.checkpoints import is_finite
from mergekit_moe_ext.merging.layers import LayerParts, chosen_layers, parts_of
from mergekit_moe_ext.merging.manifest import SharedTensor, check_against, manifest_of
from mergekit_moe_ext.merging.method import CopiedTensor, Job, MethodOptions, Plan
from mergekit_moe_ext.merging.tasks import Filled, LoadFiniteTensor
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
    assert dict(manifest.shapes) == {
        name: tuple(t.shape) for name, t in read_tensors(tmp_path).items()
    }
    expected = {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}
    assert manifest.tied == expected
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


@pytest.mark.parametrize(
    ("name", "options", "attention", "cross_attention", "ffns"),
    [
        ("LlamaForCausalLM", {}, ["self_attn"], [], [["mlp"]]),
        ("OPTForCausalLM", {}, ["self_attn"], [], [["fc1", "fc2"]]),
        ("BertForSequenceClassification", {}, ["attention"], [], [["intermediate", "output"]]),
        ("DistilBertForSequenceClassification", {}, ["attention"], [], [["ffn"]]),
        ("GPT2LMHeadModel", {"add_cross_attention": True}, ["attn"], ["crossattention"], [["mlp"]]),
        (
            "T5ForConditionalGeneration",
            {},
            ["layer.0.SelfAttention"],
            ["layer.1.EncDecAttention"],
            [["layer.2.DenseReluDense"]],
        ),
    ],
)
def test_what_of_a_layer_is_attention_and_what_is_an_ffn(
    name, options, attention, cross_attention, ffns
):
    model_class = getattr(transformers, name)
    with torch.device("meta"):
        model = model_class(model_class.config_class(**options))
    *_, last = chosen_layers(model, None).values()
    assert parts_of(last) == LayerParts(attention, cross_attention, ffns)


def test_a_plan_has_the_shapes_of_what_it_is_made_of():
    model = ModelReference.model_validate("./source")
    plan = Plan(
        config=LlamaConfig(),
        num_experts=1,
        experts_per_token=1,
        shared={"norm": SharedTensor(WeightInfo(name="norm"), (4,))},
        copies={"expert": CopiedTensor(model, "mlp", (2, 3))},
        computed={"gate": Filled(name="gate", shape=(1, 4), dtype="float32")},
        dtype=torch.float16,
    )
    assert plan.shapes == {"norm": (4,), "expert": (2, 3), "gate": (1, 4)}
    assert plan.bytes == 2 * (4 + 6 + 4)


def test_a_source_is_loaded_with_a_check_unless_that_is_waived(tmp_path):
    model = ModelReference.model_validate(str(make_model(tmp_path, 0)))
    for allow_nonfinite, kind in ((False, LoadFiniteTensor), (True, LoadTensor)):
        options = MethodOptions(allow_nonfinite=allow_nonfinite)
        job = Job(None, MergeOptions(), None, options, [], None)
        load = job.load(model, "model.norm.weight", "float16")
        assert type(load) is kind
        assert load.execute().dtype == torch.float16
