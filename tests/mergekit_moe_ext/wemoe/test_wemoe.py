"""`merge_method: wemoe` and `ewemoe`, from YAML to a model that any process can load."""

import itertools
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BioGptConfig,
    BioGptForCausalLM,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    MobileViTConfig,
    MobileViTForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

from mergekit_moe_ext import UserError
from mergekit_moe_ext.modeling.configuration_wemoe import Ensembling
from tests.conftest import document, make_model, merge, read_tensors, run
from tests.mergekit_moe_ext.ensembles import build, inputs_of
from tests.mergekit_moe_ext.merging.test_bad_input import refused
from tests.tokenizers import save_tokenizer

SOURCES = ("math", "code")
CONSTANT = {"router_layers": 0}
LAMBDA = {"lambda": 0.3}
IDS = torch.randint(2, 96, (3, 7), generator=torch.Generator().manual_seed(0))
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
CLASSIFIERS = {
    "vit": (ViTForImageClassification, ViTConfig, {"image_size": 12, "patch_size": 4}),
    "bert": (BertForSequenceClassification, BertConfig, {"vocab_size": 96}),
}
INPUTS = {
    "vit": {"pixel_values": torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))},
    "bert": {"input_ids": IDS},
}
# In a process of its own, without this package: keeps logits, and saves each model again.
OUTSIDE = """
import sys
for name in ('mergekit_moe_ext', '_mergekit_moe_ext_autoload', 'mergekit'): sys.modules[name] = None
import torch, transformers
inputs = torch.load(sys.argv[1])
for name in sys.argv[2:]:
    model, info = getattr(transformers, inputs[name][0]).from_pretrained(
        name, trust_remote_code=True, output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        torch.save(model(**inputs[name][1]).logits, f"{name}.pt")
    if model.can_generate():
        model.generate(inputs[name][1]["input_ids"], max_new_tokens=2)
    model.save_pretrained(f"{name}-again")
"""


def wemoe(models=SOURCES, method="wemoe", base="./base", **parameters):
    keys = {key: parameters.pop(key) for key in ("dtype", "out_dtype") if key in parameters}
    return document(method, models, base, parameters=parameters, **keys)


def load(path, auto=AutoModelForCausalLM, **options):
    model, info = auto.from_pretrained(
        path, output_loading_info=True, trust_remote_code=True, **options
    )
    assert not any(info.values()), info
    return model.eval()


def make_classifier(path, seed, family="vit", labels=None, **more):
    """The base is seed 0; `labels` names the classes, or says how many."""
    model_class, config_class, sizes = CLASSIFIERS[family]
    names = (
        [f"LABEL_{i}" for i in range(labels)]
        if isinstance(labels, int)
        else labels or ["cat", "dog"]
    )
    torch.manual_seed(0)
    config = config_class(**SMALL, **sizes, **more)
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    model = model_class(config)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if seed:
                parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
    model.save_pretrained(path)
    return path


@torch.no_grad()
def logits_of(model, inputs=None):
    return model(**(inputs or {"input_ids": IDS})).logits


@pytest.mark.parametrize(
    "parameters", [CONSTANT, {"router_init_std": 0.0}, {**CONSTANT, "shared_router": True}]
)
@pytest.mark.parametrize("upscale", ["mlp", "attention+mlp", "block"])
def test_untrained_it_is_task_arithmetic(here, parameters, upscale):
    stock = merge(
        document("task_arithmetic", ("base", *SOURCES), parameters={**LAMBDA, "weight": 1.0}),
        "stock",
    )
    model = load(merge(wemoe(upscale=upscale, **LAMBDA, **parameters)))
    expected = logits_of(AutoModelForCausalLM.from_pretrained(stock).eval())
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)
    merged, base = read_tensors(Path("stock")), read_tensors(here / "base")
    ours = read_tensors(Path("out"))
    upscaled = set().union(*model.ensembling.groups.values())
    for name, tensor in merged.items():
        copied = name.removesuffix(".weight") in upscaled
        assert torch.equal(ours[name], base[name] if copied else tensor), name


def task_arithmetic(auto):
    """./base with 0.3 times the task vectors of SOURCES."""
    model = auto.from_pretrained("base").eval()
    sources = [auto.from_pretrained(name).state_dict() for name in SOURCES]
    state = {}
    for name, tensor in model.state_dict().items():
        state[name] = tensor + 0.3 * sum(source[name] - tensor for source in sources)
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("family", ["gpt2", "t5", "qwen2", "opt"])
def test_untrained_it_is_task_arithmetic_in_other_families_too(tmp_path, monkeypatch, family):
    monkeypatch.chdir(tmp_path)
    more = {
        "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 4},
        "t5": {"d_model": 32, "d_ff": 48, "d_kv": 8},
    }
    more["opt"] = {"word_embed_proj_dim": 32, "ffn_dim": 48}
    more["t5"] |= {"num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
    for seed, name in enumerate(("base", *SOURCES)):
        make_model(tmp_path / name, seed, family=family, **more.get(family, {}))
    auto = AutoModelForSeq2SeqLM if family == "t5" else AutoModelForCausalLM
    inputs = {"input_ids": IDS, **({"decoder_input_ids": IDS[:, :4]} if family == "t5" else {})}
    model = load(merge(wemoe(router_init_std=0.0, **LAMBDA)), auto)
    expected = logits_of(task_arithmetic(auto), inputs)
    torch.testing.assert_close(logits_of(model, inputs), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_of_mixtures_attention_alone_is_routed(tmp_path, monkeypatch, family):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", *SOURCES)):
        make_model(tmp_path / name, seed, family=family, num_local_experts=4)
    for upscale in ("mlp", "block"):
        with pytest.raises(UserError, match="of which only the attention can be weighed"):
            merge(wemoe(upscale=upscale))
    model = load(merge(wemoe(upscale="attention", router_init_std=0.0, **LAMBDA)))
    expected = logits_of(task_arithmetic(AutoModelForCausalLM))
    torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("upscale", ["mlp", "block"])
def test_one_source_with_a_constant_of_one_is_that_source(here, upscale):
    model = load(
        merge(wemoe(("math",), **CONSTANT, init_lambda=1.0, upscale=upscale, **{"lambda": 1.0}))
    )
    expected = logits_of(AutoModelForCausalLM.from_pretrained("math").eval())
    torch.testing.assert_close(logits_of(model), expected, atol=1e-5, rtol=1e-5)


def test_routers_start_at_init_lambda_with_a_seeded_small_deviation(here):
    first = read_tensors(
        merge(wemoe(init_lambda=0.2, router_init_std=0.05), "first", random_seed=3)
    )
    again = read_tensors(
        merge(wemoe(init_lambda=0.2, router_init_std=0.05), "again", random_seed=3)
    )
    routers = {name: tensor for name, tensor in first.items() if name.startswith("routers.")}
    parameters = ("hidden.weight", "hidden.bias", "weight", "bias")
    pairs = itertools.product(range(3), parameters)
    assert set(routers) == {f"routers.{index}.{parameter}" for index, parameter in pairs}
    for name, tensor in routers.items():
        assert torch.equal(tensor, again[name])
        if name.endswith("hidden.bias"):
            assert torch.equal(tensor, torch.zeros(32))
        elif name.endswith(".bias"):
            assert torch.equal(tensor, torch.full((2,), 0.2))
        else:
            assert 0.03 < tensor.std() < 0.07
    assert not torch.equal(routers["routers.0.weight"], routers["routers.1.weight"])
    other = read_tensors(merge(wemoe(router_init_std=0.05), "other", random_seed=4))
    assert not torch.equal(other["routers.0.weight"], routers["routers.0.weight"])


@pytest.mark.parametrize("sparsity", [0.9, 0.55])
def test_ewemoe_keeps_the_largest_elements_and_no_others(here, sparsity):
    out = read_tensors(merge(wemoe(method="ewemoe", sparsity=sparsity)))
    sources = [read_tensors(here / name) for name in ("base", *SOURCES)]
    linears = [name.removesuffix(".values") for name in out if name.endswith(".values")]
    assert len(linears) == 9 and not any(name.endswith(".vectors") for name in out)
    for linear in linears:
        base, *others = (source[f"{linear}.weight"] for source in sources)
        count = round((1 - sparsity) * base.numel())
        assert (
            out[f"{linear}.values"].shape == (2, count)
            and out[f"{linear}.columns"].dtype == torch.uint16
        )
        for expert, other in enumerate(others):
            elements = []
            for row, of_row in enumerate((other - base).tolist()):
                elements += [(abs(v), row, column, v) for column, v in enumerate(of_row)]
            elements = sorted(elements, reverse=True)[:count]
            kept = {(row, column): v for _, row, column, v in elements}
            stored, start = {}, 0
            for row, end in enumerate(out[f"{linear}.row_ends"][expert].tolist()):
                for place in range(start, end):
                    column = int(out[f"{linear}.columns"][expert].long()[place])
                    stored[row, column] = out[f"{linear}.values"][expert][place].item()
                start = end
            assert stored == pytest.approx(kept, abs=1e-7) and len(stored) == count


def test_biases_are_pruned_where_that_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", *SOURCES)):
        make_classifier(name, seed)
    whole = read_tensors(merge(wemoe(method="ewemoe", sparsity=0.75)))
    out = merge(wemoe(method="ewemoe", sparsity=0.75, prune_biases=True), "pruned")
    pruned = read_tensors(out)
    biases = [name for name in whole if name.endswith(".bias_vectors")]
    assert len(biases) == 4 and pruned.keys() == whole.keys()
    for name in whole:
        expected = whole[name].clone()
        if name in biases:
            for vector in expected:
                by_size = sorted(range(len(vector)), key=lambda place: abs(vector[place].item()))
                vector[by_size[: len(vector) * 3 // 4]] = 0
        assert torch.equal(pruned[name], expected), name
    logits = []
    for path in ("out", out):
        logits.append(logits_of(load(path, AutoModelForImageClassification), INPUTS["vit"]))
    assert not torch.equal(*logits)


def test_sparse_vectors_take_a_tenth_of_the_dense_plus_their_indices(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
    for seed, name in enumerate(("base", *SOURCES)):
        make_model(tmp_path / name, seed, **sizes)
    parameters = {**CONSTANT, "dtype": "float32"}
    base, dense, sparse = (
        path.stat().st_size
        for path in (
            tmp_path / "base" / "model.safetensors",
            merge(wemoe(**parameters), "dense") / "model.safetensors",
            merge(wemoe(method="ewemoe", **parameters), "sparse") / "model.safetensors",
        )
    )
    share = (sparse - base) / (dense - base)
    assert 0.15 <= share < 0.17, (
        share
    )  # a value of four bytes and an index of two, and where rows end


@pytest.mark.parametrize(
    "keys",
    [
        {"dtype": "bfloat16"},
        {"out_dtype": "bfloat16"},
        {"dtype": "float32", "out_dtype": "float16"},
    ],
)
def test_indices_are_written_as_they_are_whatever_the_dtype(here, keys):
    wide = read_tensors(merge(wemoe(method="ewemoe"), "wide"))
    out = merge(wemoe(method="ewemoe", **keys))
    wanted = getattr(torch, keys.get("out_dtype", keys.get("dtype", "")))
    for name, tensor in read_tensors(out).items():
        if name.endswith((".columns", ".row_ends")):
            assert tensor.dtype == wide[name].dtype
            if "dtype" not in keys or keys["dtype"] == "float32":
                assert torch.equal(tensor, wide[name])
        else:
            assert tensor.dtype == wanted, name
    model = load(out, dtype="auto")
    assert model.dtype == wanted and torch.isfinite(logits_of(model)).all()
    uncast = {name for name in wide if name.endswith(".columns")}
    allowed = read_tensors(merge(wemoe(method="ewemoe", allow_nonfinite=True, **keys), "allowed"))
    assert all(allowed[name].dtype == torch.uint16 for name in uncast)


@pytest.mark.parametrize(
    ("layers", "expected"), [("all", {0, 1, 2}), (1, {1}), ("0,2", {0, 2}), ("1-2", {1, 2})]
)
def test_blocks_that_are_not_upscaled_are_merged_with_the_rest(here, layers, expected):
    model = load(merge(wemoe(upscale_layers=layers, **CONSTANT, **LAMBDA)))
    assert set(model.ensembling.groups) == {f"model.layers.{index}.mlp" for index in expected}
    stock = merge(
        document("task_arithmetic", ("base", *SOURCES), parameters={**LAMBDA, "weight": 1.0}),
        "stock",
    )
    expected_logits = logits_of(AutoModelForCausalLM.from_pretrained(stock).eval())
    torch.testing.assert_close(logits_of(model), expected_logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("parameters", "fragments"),
    [
        ({"upscale_layers": "0-"}, ["`upscale_layers`", "'0-'", "6-11 or 0,3,6"]),
        ({"upscale_layers": "2-1"}, ["`upscale_layers`", "go up"]),
        ({"upscale_layers": ""}, ["`upscale_layers`", "write all"]),
        ({"upscale_layers": [0, 1]}, ["`upscale_layers`", "not a list"]),
        ({"upscale_layers": "0,3"}, ["./base", "upscale_layers", "no layer 3", "the last is 2"]),
        ({"upscale": "heads"}, ["`upscale`", "'heads'", "mlp"]),
        ({"router_layers": 3}, ["`router_layers`"]),
        ({"sparsity": 1.0}, ["`sparsity`", "less than 1"]),
        ({"prune_biases": True}, ["prune_biases: true", "a sparsity above 0"]),
        ({"init_lamda": 0.3}, ["`init_lamda`", "did you mean `init_lambda`"]),
        ({"shared": "moe_ties"}, ["shared", "not a tensor method"]),
        ({"mode": "sliding"}, ["`mode`", "'frozen' or 'running'"]),
    ],
)
def test_wrong_options_say_what_is_right(here, parameters, fragments):
    refused(here, wemoe(**parameters), *fragments)


def test_a_base_must_be_named_and_must_not_be_a_source(here):
    refused(here, wemoe(base=None), "base_model")
    refused(here, wemoe(("base", "math")), "`base_model:`", "must not be among `models:`")
    refused(here, wemoe(("nowhere", "math")), "nowhere", "does not exist")


def test_what_a_batch_norm_has_counted_is_refused(tmp_path, monkeypatch):
    """MobileViT has several widths, and no `hidden_size` that a size could be implied by."""
    monkeypatch.chdir(tmp_path)
    model = MobileViTForImageClassification(
        MobileViTConfig(hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8] * 7)
    )
    for name in ("base", "a"):
        model.save_pretrained(name)
    refused(tmp_path, wemoe(("a",)), "num_batches_tracked", "of ./a is I64")


def test_a_tokenizer_that_needs_another_library_is_left_out(tmp_path, monkeypatch, caplog):
    """BioGPT's needs sacremoses; neither it nor the tokenizer's files are there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "sacremoses", None)
    model = BioGptForCausalLM(BioGptConfig(**SMALL, vocab_size=32))
    for name in ("base", "a"):
        model.save_pretrained(name)
    load(merge(wemoe(("a",))))
    assert "the output has no tokenizer: ./base has no tokenizer" in caplog.text


def test_models_that_do_not_fit_are_refused(here, tmp_path):
    make_model(tmp_path / "qwen", 1, family="qwen2")
    refused(here, wemoe(("math", "qwen")), "qwen", "Qwen2ForCausalLM", "LlamaForCausalLM")
    make_model(tmp_path / "deep", 1, num_hidden_layers=4)
    refused(here, wemoe(("math", "deep")), "deep", "num_hidden_layers")
    for name in ("moe-a", "moe-b"):
        make_model(tmp_path / name, 1, family="mixtral", num_local_experts=2)
    refused(here, wemoe(("moe-b",), base="./moe-a"), "moe-a", "has no MLP")
    for name in ("whisper-a", "whisper-b"):
        config = {"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper"}
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    refused(
        here,
        wemoe(("whisper-b",), base="./whisper-a"),
        "whisper-a",
        "WhisperForConditionalGeneration",
    )


def test_nan_in_a_vector_is_refused_and_leaves_nothing(here):
    shutil.copytree(here / "math", here / "broken")
    tensors = load_file(here / "broken" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, here / "broken" / "model.safetensors", metadata={"format": "pt"})
    for method in ("wemoe", "ewemoe"):
        refused(
            here,
            wemoe(("broken", "code"), method),
            "model.layers.1.mlp.up_proj.weight",
            "broken",
            "NaN",
        )
    merge(wemoe(("broken", "code"), allow_nonfinite=True))


@pytest.mark.parametrize("family", ["vit", "bert"])
def test_heads_of_their_own_are_kept_per_task(tmp_path, monkeypatch, family):
    monkeypatch.chdir(tmp_path)
    make_classifier(tmp_path / "base", 0, family, labels=5)
    make_classifier(tmp_path / "sun", 1, family, labels=["beach", "sky", "sea"])
    make_classifier(tmp_path / "cars-1.5", 2, family, labels=["bmw", "audi"])
    auto = (
        AutoModelForImageClassification if family == "vit" else AutoModelForSequenceClassification
    )
    out = merge(wemoe(("sun", "cars-1.5"), **LAMBDA, **CONSTANT))
    model = load(out, auto)
    for task in ("sun", "cars-1.5"):
        source = auto.from_pretrained(task).eval()
        reference = auto.from_pretrained(task).eval()
        base, others = (
            auto.from_pretrained("base").state_dict(),
            [auto.from_pretrained(n) for n in ("sun", "cars-1.5")],
        )
        state = {}
        for name, tensor in base.items():
            if not name.startswith("classifier."):
                state[name] = tensor + 0.3 * sum(
                    other.state_dict()[name] - tensor for other in others
                )
        reference.load_state_dict({**source.state_dict(), **state})
        actual, expected = (
            logits_of(model, {**INPUTS[family], "task": task}),
            logits_of(reference, INPUTS[family]),
        )
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert model.config.ensembling["heads"] == {
        "sun": ["beach", "sky", "sea"],
        "cars-1.5": ["bmw", "audi"],
    }
    for task in ({}, {"task": "law"}):
        with pytest.raises(ValueError, match=r"sun, cars-1\.5"):
            model(**INPUTS[family], **task)


@pytest.mark.parametrize("files", [["preprocessor_config.json"], []])
def test_a_model_of_images_is_not_missed_a_tokenizer(tmp_path, monkeypatch, caplog, files):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "sun", "cars")):
        make_classifier(tmp_path / name, seed)
    for file in files:
        (tmp_path / "base" / file).write_text("{}")
    out = merge(wemoe(("sun", "cars"), **LAMBDA, **CONSTANT))
    assert "tokenizer" not in caplog.text
    assert all((out / file).exists() for file in files)


def test_one_head_is_merged_only_where_all_have_the_same_named_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "sun", "cars")):
        make_classifier(tmp_path / name, seed)
    model = load(merge(wemoe(("sun", "cars"), **LAMBDA), "same"), AutoModelForImageClassification)
    assert not model.ensembling.heads and logits_of(model, INPUTS["vit"]).shape == (2, 2)
    make_classifier(tmp_path / "base", 0, labels=5)  # the base has other classes than the sources
    model = load(
        merge(wemoe(("sun", "cars"), **LAMBDA), "other-base"), AutoModelForImageClassification
    )
    assert model.ensembling.heads == {"sun": ["cat", "dog"], "cars": ["cat", "dog"]}
    for seed, name in enumerate(("base", "sun", "cars")):  # two classes each, which nobody named
        make_classifier(tmp_path / name, seed, labels=2)
    model = load(
        merge(wemoe(("sun", "cars"), **LAMBDA), "unnamed"), AutoModelForImageClassification
    )
    assert model.ensembling.heads == {"sun": ["LABEL_0", "LABEL_1"], "cars": ["LABEL_0", "LABEL_1"]}


@pytest.mark.parametrize("prefixed", [(), ("base", "sun", "cars"), ("base",), ("cars",)])
def test_the_vision_tower_of_clip(tmp_path, monkeypatch, prefixed):
    """On the Hub its names begin with `vision_model.`, and it may hold what is no parameter."""
    monkeypatch.chdir(tmp_path)
    config = CLIPVisionConfig(**SMALL, image_size=12, patch_size=4, projection_dim=8)
    for seed, name in enumerate(("base", "sun", "cars")):
        torch.manual_seed(seed)
        CLIPVisionModel(config).save_pretrained(name)
    sources = {name: read_tensors(tmp_path / name) for name in ("base", "sun", "cars")}
    for name in prefixed:
        tensors = {f"vision_model.{key}": tensor for key, tensor in sources[name].items()}
        tensors["vision_model.embeddings.position_ids"] = torch.arange(10)[None]
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    base = sources["base"]
    state = {}
    for name, tensor in base.items():
        state[name] = tensor + 0.3 * sum(sources[of][name] - tensor for of in ("sun", "cars"))
    stock = CLIPVisionModel(config).eval()
    stock.load_state_dict(state)
    for upscale in ("mlp", "auto", "all"):
        out = merge(wemoe(("sun", "cars"), **CONSTANT, **LAMBDA, upscale=upscale), upscale)
        assert {name for name in read_tensors(out) if name in base} == set(base)
        with torch.no_grad():
            found = load(out, AutoModel)(**INPUTS["vit"]).pooler_output
            torch.testing.assert_close(
                found, stock(**INPUTS["vit"]).pooler_output, atol=1e-5, rtol=1e-5
            )


def test_a_model_loads_where_this_package_is_missing_and_saves_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inputs = {}
    for seed, name in enumerate(("base", *SOURCES)):
        make_model(
            tmp_path / name, seed, num_hidden_layers=12, hidden_size=16, intermediate_size=24
        )
    merge(wemoe(), "made-llama")
    inputs["llama"] = ("AutoModelForCausalLM", {"input_ids": IDS})
    for seed, name in enumerate(("vbase", "sun", "cars")):
        make_classifier(tmp_path / name, seed, labels=2)
    merge(wemoe(("sun", "cars"), "ewemoe", base="./vbase", dtype="bfloat16"), "made-vit")
    inputs["vit"] = ("AutoModelForImageClassification", {**INPUTS["vit"], "task": "cars"})
    inputs["vit"][1]["pixel_values"] = inputs["vit"][1]["pixel_values"].bfloat16()
    autos = {"llama": AutoModelForCausalLM, "vit": AutoModelForImageClassification}
    expected = {}
    for name in inputs:
        expected[name] = logits_of(load(f"made-{name}", autos[name]), inputs[name][1])
        assert Path(f"made-{name}", "wemoe_kernel.py").exists()  # Triton need not be there
        Path(f"made-{name}").rename(tmp_path / name)
    torch.save(inputs, "inputs.pt")
    environment = {
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(tmp_path / "hf"),
    }
    done = run(sys.executable, "-c", OUTSIDE, "inputs.pt", *inputs, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    for name in inputs:
        assert torch.equal(torch.load(f"{name}.pt"), expected[name])
        first, again = read_tensors(tmp_path / name), read_tensors(tmp_path / f"{name}-again")
        assert first.keys() == again.keys() and all(
            torch.equal(again[key], first[key]) for key in first
        )
        assert torch.equal(
            logits_of(load(f"{name}-again", autos[name]), inputs[name][1]), expected[name]
        )


SWIN = SwinConfig(
    image_size=12, patch_size=3, embed_dim=8, depths=[1, 1], num_heads=[1, 1], window_size=2
)
CLIP = CLIPConfig(
    text_config={**SMALL, "vocab_size": 96, "max_position_embeddings": 16},
    vision_config={**SMALL, "image_size": 12, "patch_size": 4},
    projection_dim=8,
)


@pytest.mark.parametrize(
    ("model_class", "config", "auto", "renamed"),
    [
        (
            ViTForImageClassification,
            ViTConfig(**SMALL, image_size=12, patch_size=4),
            AutoModelForImageClassification,
            1,
        ),
        (ViTModel, ViTConfig(**SMALL, image_size=12, patch_size=4), AutoModel, 1),
        (SwinForImageClassification, SWIN, AutoModelForImageClassification, 1),
        (CLIPModel, CLIP, AutoModel, 0),
    ],
)
def test_names_in_the_file_are_those_of_the_base_s_checkpoints(
    tmp_path, monkeypatch, model_class, config, auto, renamed
):
    monkeypatch.chdir(tmp_path)
    config.id2label = {0: "cat", 1: "dog"}
    for seed, name in enumerate(("base", "sun")):
        torch.manual_seed(seed)
        model_class(config).save_pretrained(name)
    merge(wemoe(("sun",), **CONSTANT, init_lambda=1.0, upscale="attention+mlp", **{"lambda": 1.0}))
    base, out = (set(read_tensors(tmp_path / name)) for name in ("base", "out"))
    assert base <= out
    assert bool(renamed) == (base != set(auto.from_pretrained("base").state_dict()))
    more = {name.rpartition(".")[0] for name in out - base if not name.startswith("routers.")}
    assert more <= {name.rpartition(".")[0] for name in base}
    inputs = {**INPUTS["vit"], **({"input_ids": IDS} if model_class is CLIPModel else {})}
    with torch.no_grad():
        expected = auto.from_pretrained("sun").eval()(**inputs)[0]
        model = load(tmp_path / "out", auto)
        torch.testing.assert_close(model(**inputs)[0], expected, atol=1e-5, rtol=1e-5)
        model.save_pretrained("again")
        assert set(read_tensors(tmp_path / "again")) == out
        torch.testing.assert_close(load("again", auto)(**inputs)[0], expected, atol=1e-5, rtol=1e-5)


def test_routers_are_numbered_by_layer_whatever_json_makes_of_their_order():
    """JSON sorts layer 10 before layer 2."""
    groups = {f"layers.{index}.mlp": [f"layers.{index}.mlp.up"] for index in range(12)}
    heads = {"b": ["z", "y"], "a": ["c"]}
    kept = Ensembling(experts=["b", "a"], groups=groups, heads=heads)
    read = Ensembling.from_dict(json.loads(json.dumps(kept.as_dict(), sort_keys=True)))
    assert list(read.groups) == list(kept.groups) == list(groups)
    assert list(read.heads.items()) == list(heads.items())


def test_a_trained_model_of_many_layers_is_saved_and_loaded(tmp_path):
    model = build("llama", base=None)
    expected = logits_of(model, inputs_of("llama"))
    model.save_pretrained(tmp_path / "saved")
    saved = load(tmp_path / "saved")
    torch.testing.assert_close(logits_of(saved, inputs_of("llama")), expected, atol=0, rtol=0)


def test_an_output_that_has_the_routers_deviation_under_its_old_name_loads(tmp_path):
    model = build("llama")
    expected = logits_of(model, inputs_of("llama"))
    model.save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text())
    config["ensembling"].pop("router_init_std", None)
    config["ensembling"]["init_std"] = 0.7
    path.write_text(json.dumps(config))
    saved = load(tmp_path / "saved")
    torch.testing.assert_close(logits_of(saved, inputs_of("llama")), expected, atol=0, rtol=0)
    assert saved.ensembling.router_init_std == 0.7


def test_one_router_for_widths_that_differ_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "sun")):
        torch.manual_seed(seed)
        SwinForImageClassification(SWIN).save_pretrained(name)
    refused(tmp_path, wemoe(("sun",), shared_router=True), "shared_router", "8 and 16")


def test_the_card_says_how_to_load_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "sun", "cars")):
        make_classifier(tmp_path / name, seed)
    card = (merge(wemoe(("sun", "cars"), "ewemoe")) / "README.md").read_text()
    assert 'AutoModelForImageClassification.from_pretrained("out", trust_remote_code=True)' in card
    assert (
        "2410.21804" in card and "AutoModelForCausalLM" not in card and "AutoTokenizer" not in card
    )
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"


def loading_shown_by(out):
    return (out / "README.md").read_text().split("```python\n")[1].split("```")[0]


def test_what_the_card_shows_runs(here, caplog):
    save_tokenizer(here / "texts", 96)
    shutil.copytree("base", "texts", dirs_exist_ok=True)
    text: dict = {}
    exec(loading_shown_by(merge(document("wemoe", SOURCES, "./texts"))), text)
    assert text["tokenizer"]("w1 w2")["input_ids"] and "Llama" in type(text["model"]).__name__
    assert (
        'AutoTokenizer.from_pretrained("out", trust_remote_code=True)'
        in (here / "out/README.md").read_text()
    )
    for seed, name in enumerate(("images", "sun", "cars")):
        make_classifier(here / name, seed, labels=2 + seed)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(here / "images")
    shown = loading_shown_by(merge(document("wemoe", ("sun", "cars"), "./images"), "of-images"))
    assert "tokenizer" not in caplog.text
    images: dict = {}
    exec(shown, images)
    assert type(images["processor"]).__name__.startswith("ViT") and "AutoTokenizer" not in shown
    assert '# a head per task: model(..., task="sun"), or "cars"' in shown


def test_code_beside_the_base_is_not_the_output_s(here):
    shutil.copytree("base", "with-code")
    config = json.loads(Path("with-code/config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_other.Other"}
    Path("with-code/config.json").write_text(json.dumps(config))
    out = merge(document("wemoe", SOURCES, "./with-code", parameters=CONSTANT))
    named = json.loads((out / "config.json").read_text())["auto_map"]
    assert named["AutoModelForCausalLM"] == "modeling_wemoe.WEMoELlamaForCausalLM"
