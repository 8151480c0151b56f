"""`upscale: all`, which is AdaMerging: every parameter is the base's plus constants times task
vectors.
"""

import copy
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.func import functional_call
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    CLIPVisionConfig,
    CLIPVisionModel,
    DynamicCache,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

from mergekit_moe_ext.modeling import modeling_wemoe
from mergekit_moe_ext.modeling.configuration_wemoe import vectors_of
from mergekit_moe_ext.modeling.wemoe_tensors import WeighedTensor
from mergekit_moe_ext.wemoe.groups import weighed_tensors
from mergekit_moe_ext.wemoe.unloading import unload
from tests.conftest import document, make_model, merge, read_tensors, run
from tests.mergekit_moe_ext.ensembles import (
    EXPERTS,
    FAMILIES,
    IMAGES,
    PAIRS,
    build,
    inputs_of,
    padded,
    with_constants,
)
from tests.mergekit_moe_ext.merging.test_bad_input import refused
from tests.mergekit_moe_ext.modeling.test_wemoe_model import (
    GREEDY,
    close,
    gradients,
    routers_only,
    stepwise,
)
from tests.mergekit_moe_ext.wemoe.test_wemoe import (
    IDS,
    INPUTS,
    LAMBDA,
    OUTSIDE,
    SOURCES,
    load,
    logits_of,
    make_classifier,
)
from tests.mergekit_moe_ext.wemoe.test_wemoe import wemoe as any_wemoe
from tests.tokenizers import save_tokenizer

ALL = {"upscale": "all", "router_layers": 0}
T5 = {
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}


def wemoe(models=SOURCES, **parameters):
    return any_wemoe(models, **{**ALL, **parameters})


@pytest.mark.parametrize("shared_router", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_is_the_stock_model_with_merged_parameters(family, shared_router):
    model, inputs = build(family, upscale="all", shared_router=shared_router), inputs_of(family)
    if family not in IMAGES:
        inputs |= padded({"input_ids": inputs["input_ids"]}, "left")
    stock, weights = with_constants(model, family)
    assert weights.keys() == set(stock.state_dict()) - {name for name, _ in stock.named_buffers()}
    close(model(**inputs)[0], functional_call(stock, weights, kwargs=inputs)[0])


@pytest.mark.parametrize("family", ["vit", "llama-tied", "t5"])
def test_constants_get_the_gradients_of_the_merged_stock_model_and_nothing_else_any(family):
    inputs, model = inputs_of(family), routers_only(build(family, upscale="all"))
    target = torch.randn_like(model(**inputs)[0])
    actual = gradients(model, (model(**inputs)[0] * target).sum())
    stock, weights = with_constants(model, family)
    expected = gradients(model, (functional_call(stock, weights, kwargs=inputs)[0] * target).sum())
    assert len(actual) == len(model.ensembling.groups)
    for name, gradient in actual.items():
        close(gradient, expected[name], atol=1e-3, rtol=1e-3)
        assert gradient.abs().sum() > 0
    assert all(
        p.grad is None for name, p in model.named_parameters() if not name.startswith("routers.")
    )


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama-tied", "vit"])
def test_gradient_checkpointing_changes_no_gradient(family, reentrant):
    model = routers_only(build(family, upscale="all"))
    batches = [inputs_of(family, seed=seed) for seed in (0, 1)]

    def loss():
        return sum(torch.special.entr(model(**batch)[0].softmax(-1)).sum() for batch in batches)

    expected = gradients(model, loss())
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    for name, gradient in gradients(model, loss()).items():
        close(gradient, expected[name])


def test_there_are_as_many_constants_as_parameters_times_tasks():
    """B.1: 199 parameters of ViT-B/32 in transformers' layout, whose queries, keys and values are
    apart.
    """
    config = CLIPVisionConfig(patch_size=32)
    with torch.device("meta"):
        groups = weighed_tensors(CLIPVisionModel(config))
        values = {
            "experts": [f"task{index}" for index in range(8)],
            "groups": groups,
            "per_tensor": True,
        }
        for shared_router, count in ((False, 8 * (12 * 16 + 7)), (True, 8)):
            ensembling = {**values, "router_layers": 0, "shared_router": shared_router}
            ours = modeling_wemoe.config_class(CLIPVisionConfig)(
                patch_size=32, ensembling=ensembling
            )
            model = modeling_wemoe.model_class(CLIPVisionModel)(ours)
            assert sum(parameter.numel() for parameter in model.routers.parameters()) == count


@pytest.mark.parametrize("family", ["llama", "llama-tied", *PAIRS])
@torch.no_grad()
def test_generates_what_the_stock_model_with_merged_parameters_does(family):
    model, ids = build(family, upscale="all"), inputs_of(family)["input_ids"]
    stock, weights = with_constants(model, family)
    stock.load_state_dict(weights, strict=False)
    given = model.coefficients(**inputs_of(family))
    assert given.shape == (1, len(model.ensembling.groups), len(EXPERTS))
    for more in ({}, {"num_beams": 3}, {"use_cache": False}):
        expected = stock.generate(ids, **GREEDY, pad_token_id=0, **more)
        assert torch.equal(model.generate(ids, **GREEDY, pad_token_id=0, **more), expected)
        assert torch.equal(
            model.generate(ids, **GREEDY, pad_token_id=0, coefficients=given, **more), expected
        )


@torch.no_grad()
def test_a_cache_keeps_what_was_merged_once_for_tied_parameters(monkeypatch):
    model, batch = build("llama-tied", upscale="all"), padded(inputs_of("llama"), "left")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    merged, calls = WeighedTensor.merged, []

    def counted(self, *args):
        calls.append(self.group)
        return merged(self, *args)

    monkeypatch.setattr(WeighedTensor, "merged", counted)
    cache = DynamicCache(config=model.config)
    stepped = stepwise(model, ids, mask, 5, cache)
    assert sorted(calls) == sorted(model.ensembling.groups)
    close(stepped[mask.bool()], model(ids, attention_mask=mask).logits[mask.bool()])
    for beams in (1, 3):
        calls.clear()
        model.generate(ids, attention_mask=mask, max_new_tokens=4, num_beams=beams, pad_token_id=0)
        assert sorted(calls) == sorted(model.ensembling.groups)


def test_of_tied_parameters_the_one_that_is_stored_is_weighed():
    """In some families the head comes first, and is what is tied."""
    config = XLMRobertaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=24, num_hidden_layers=1
    )
    with torch.device("meta"):
        stock = XLMRobertaForMaskedLM(config)
    stored = (
        set(stock.state_dict())
        - set(stock.all_tied_weights_keys)
        - {name for name, _ in stock.named_buffers()}
    )
    assert (
        set(weighed_tensors(stock)) == stored
        and "roberta.embeddings.word_embeddings.weight" in stored
    )


def test_a_parameter_that_is_gone_is_missed_as_in_any_module():
    model = build("vit", upscale="all")
    del model.classifier._parameters["bias"]
    assert not hasattr(model.classifier, "bias") and hasattr(model.classifier, "weight")


@torch.no_grad()
def test_given_coefficients_are_one_set_for_all_samples():
    model, inputs = build("vit", upscale="all"), inputs_of("vit")
    given = torch.rand(1, len(model.ensembling.groups), len(EXPERTS))
    for index, router in enumerate(model.routers.values()):
        router.bias.copy_(given[0, index])
    expected = model(**inputs).logits
    close(model.coefficients(**inputs), given)
    for router in model.routers.values():
        router.bias.zero_()
    close(model(**inputs, coefficients=given).logits, expected)
    close(model(**inputs, coefficients=given.expand(3, -1, -1)).logits, expected)
    with pytest.raises(ValueError, match="all are the same"):
        model(**inputs, coefficients=torch.rand(3, *given.shape[1:]))


@torch.no_grad()
def test_an_encoder_called_on_its_own_is_weighed_and_any_other_part_refused():
    model, inputs = build("t5", upscale="all"), inputs_of("t5")
    alone = model.get_encoder()(input_ids=inputs["input_ids"])[0]
    close(alone, model(**inputs).encoder_last_hidden_state)
    for part in (model.shared, model.lm_head, model.encoder.embed_tokens):
        with pytest.raises(RuntimeError, match="through its model"):
            part(inputs["input_ids"])
    with pytest.raises(ValueError, match="cannot be resized"):
        model.resize_token_embeddings(70)


def test_a_copy_of_a_model_is_on_its_own():
    model, inputs = build("llama-tied", upscale="all"), {"input_ids": IDS % 64}
    expected = logits_of(model, inputs)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.routers.parameters():
            parameter.zero_()
        copied.model.embed_tokens.vectors_of_weight.zero_()
    assert not torch.allclose(logits_of(copied, inputs), expected)
    close(logits_of(model, inputs), expected, atol=0, rtol=0)


def test_compiled_it_gives_the_same_logits():
    model, inputs = build("llama-tied", upscale="all"), inputs_of("llama")
    with torch.no_grad():
        expected = model(**inputs).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        close(compiled(**inputs, use_cache=False).logits, expected)


@torch.no_grad()
def test_half_precision_stays_near_the_same_model_in_double():
    model, inputs = build("llama-tied", upscale="all", dtype=torch.bfloat16), inputs_of("llama")
    expected = copy.deepcopy(model).double()(**inputs).logits
    logits = model(**inputs).logits
    assert logits.dtype == torch.bfloat16
    assert (logits - expected).abs().mean() / expected.abs().mean() < 0.05


def test_untrained_it_is_task_arithmetic(here):
    stock = merge(
        document("task_arithmetic", ("base", *SOURCES), parameters={**LAMBDA, "weight": 1.0}),
        "stock",
    )
    model = load(merge(wemoe()))
    expected = AutoModelForCausalLM.from_pretrained(stock).eval()
    torch.testing.assert_close(logits_of(model), logits_of(expected), atol=1e-5, rtol=1e-5)
    base, ours, merged = (read_tensors(Path(name)) for name in ("base", "out", "stock"))
    for name, tensor in base.items():
        assert torch.equal(ours[name], tensor), name
        torch.testing.assert_close(tensor + 0.3 * ours[vectors_of(name)].sum(0), merged[name])
    assert set(ours) == {
        *base,
        *(vectors_of(n) for n in base),
        *(f"routers.{i}.bias" for i in range(len(base))),
    }
    task_wise = load(merge(wemoe(shared_router=True), "task-wise"))
    assert list(task_wise.routers) == ["0"]
    torch.testing.assert_close(logits_of(task_wise), logits_of(model), atol=0, rtol=0)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_tied_embeddings_have_one_set_of_vectors_and_constants(tmp_path, monkeypatch, family):
    monkeypatch.chdir(tmp_path)
    more = {"gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 4}, "t5": T5}[family]
    for seed, name in enumerate(("base", *SOURCES)):
        make_model(tmp_path / name, seed, family=family, **more)
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    inputs = {"input_ids": IDS, **({"decoder_input_ids": IDS[:, :4]} if family == "t5" else {})}
    model = load(merge(wemoe(("math",), init_lambda=1.0)), auto)
    expected = logits_of(auto.from_pretrained("math").eval(), inputs)
    torch.testing.assert_close(logits_of(model, inputs), expected, atol=1e-4, rtol=1e-4)
    base = read_tensors(tmp_path / "base")
    assert (
        set(model.ensembling.groups)
        == set(base)
        == {n for n in read_tensors(Path("out")) if n in base}
    )
    unload("out", "unloaded")
    unloaded = auto.from_pretrained("unloaded").eval()
    torch.testing.assert_close(logits_of(unloaded, inputs), expected, atol=1e-4, rtol=1e-4)
    assert set(read_tensors(Path("unloaded"))) == set(base)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unloaded_it_is_the_stock_model_by_logits(here, dtype):
    model = load(merge(wemoe(dtype=dtype)), dtype="auto")
    with torch.no_grad():
        for index, router in enumerate(model.routers.values()):
            router.bias.copy_(torch.tensor([0.1 * index - 1, 0.5]))
    model.save_pretrained("trained")
    unload("trained", "stock")
    stock = AutoModelForCausalLM.from_pretrained("stock", dtype="auto").eval()
    assert type(stock).__module__.startswith("transformers.")
    close_enough = (
        {"atol": 1e-5, "rtol": 1e-5} if dtype == "float32" else {"atol": 0.02, "rtol": 0.02}
    )
    torch.testing.assert_close(logits_of(stock), logits_of(model), **close_enough)
    for name, tensor in read_tensors(Path("stock")).items():
        c = model.routers[str(list(model.ensembling.groups).index(name))].bias.float()
        base, vectors = (read_tensors(Path("trained"))[n].float() for n in (name, vectors_of(name)))
        assert tensor.dtype == model.dtype
        torch.testing.assert_close(
            tensor, (base + c[0] * vectors[0] + c[1] * vectors[1]).to(tensor.dtype)
        )


def test_heads_of_their_own_are_kept_and_not_weighed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_classifier(tmp_path / "base", 0, labels=5)
    make_classifier(tmp_path / "sun", 1, labels=["beach", "sky", "sea"])
    model = load(merge(wemoe(("sun",), init_lambda=1.0)), AutoModelForImageClassification)
    expected = logits_of(
        AutoModelForImageClassification.from_pretrained("sun").eval(), INPUTS["vit"]
    )
    torch.testing.assert_close(logits_of(model, INPUTS["vit"]), expected, atol=1e-5, rtol=1e-5)
    assert not any(name.startswith("classifier") for name in model.ensembling.groups)
    unload("out", "stock", "sun")
    stock = AutoModelForImageClassification.from_pretrained("stock").eval()
    torch.testing.assert_close(logits_of(stock, INPUTS["vit"]), expected, atol=1e-5, rtol=1e-5)
    make_classifier(tmp_path / "same", 0)
    make_classifier(tmp_path / "other", 1)
    merged = load(
        merge(any_wemoe(("other",), base="./same", **ALL), "merged"),
        AutoModelForImageClassification,
    )
    assert {"classifier.weight", "vit.embeddings.cls_token"} < set(merged.ensembling.groups)


def test_it_loads_where_this_package_is_missing_and_saves_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", *SOURCES)):
        make_model(tmp_path / name, seed, tie_word_embeddings=True)
    expected = logits_of(load(merge(wemoe(), "made")))
    Path("made").rename("llama")
    torch.save({"llama": ("AutoModelForCausalLM", {"input_ids": IDS})}, "inputs.pt")
    environment = {
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(tmp_path / "hf"),
    }
    done = run(sys.executable, "-c", OUTSIDE, "inputs.pt", "llama", cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load("llama.pt"), expected)
    first, again = read_tensors(Path("llama")), read_tensors(Path("llama-again"))
    assert first.keys() == again.keys() and all(
        torch.equal(again[key], first[key]) for key in first
    )


def test_layers_on_disk_give_the_same_logits(here):
    out = merge(wemoe())
    expected = logits_of(load(out))
    places = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "disk",
    }
    places |= {f"model.layers.{index}": "disk" for index in range(3)} | {"routers": "cpu"}
    model = load(out, device_map=places, offload_folder="offload")
    torch.testing.assert_close(logits_of(model), expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("parameters", "fragments"),
    [
        (
            {"router_layers": 2},
            ["upscale: all", "router_layers: 2", "no hidden states", "write router_layers: 0"],
        ),
        ({"router_layers": 1}, ["upscale: all", "router_layers: 1"]),
        ({"sparsity": 0.9}, ["upscale: all", "sparsity: 0.9", "write sparsity: 0"]),
        ({"method": "ewemoe"}, ["upscale: all", "sparsity: 0.9"]),
        ({"upscale_layers": "0-1"}, ["upscale: all", "upscale_layers: 0-1", "leave it out"]),
    ],
)
def test_what_it_cannot_be_put_together_with_is_refused(here, parameters, fragments):
    refused(here, wemoe(**parameters), *fragments)


def test_vocabularies_are_not_aligned(here):
    for name in ("base", *SOURCES):
        shutil.copytree(here / name, here / f"{name}-with-words")
        save_tokenizer(here / f"{name}-with-words", 96)
    named = [f"{name}-with-words" for name in SOURCES]
    document = any_wemoe(named, base="./base-with-words", **ALL)
    refused(
        here,
        {**document, "tokenizer_source": "base"},
        "upscale: all",
        "tokenizer",
        "not aligned",
        "leave `tokenizer` out",
    )
    merge(document)


def test_embeddings_are_not_truncated(here):
    refused(here, wemoe(), "wemoe does not truncate", unsafe_truncate_embeddings=True)


def test_a_source_that_stores_a_tied_name_only_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", *SOURCES)):
        make_model(tmp_path / name, seed, tie_word_embeddings=True)
    tensors = read_tensors(Path("code"))
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, "code/model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, wemoe(), "./code", "model.embed_tokens.weight", "only under the name")


def test_recurrent_layers_are_refused():
    model = FAMILIES["vit"][0](FAMILIES["vit"][1])
    model.lstm = torch.nn.LSTM(3, 3)
    with pytest.raises(ValueError, match="lstm of ViTForImageClassification is recurrent"):
        weighed_tensors(model)


def test_the_config_says_what_it_is(here):
    config = json.loads((merge(wemoe()) / "config.json").read_text())["ensembling"]
    assert config["per_tensor"] and all(value == [name] for name, value in config["groups"].items())
