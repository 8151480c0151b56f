"""transformers' Auto classes and pipelines load weight-ensembling models where this package is
installed.
"""

import json
import sys

import pytest
import torch
import transformers
from PIL import Image
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    ViTConfig,
    ViTImageProcessor,
    pipeline,
)

from mergekit_moe_ext.modeling.any_base import auto_class_of
from mergekit_moe_ext.modeling.configuration_wemoe import config_class
from mergekit_moe_ext.modeling.modeling_wemoe import model_class
from tests.conftest import run
from tests.mergekit_moe_ext.ensembles import FAMILIES, build, inputs_of
from tests.tokenizers import save_tokenizer

pytestmark = pytest.mark.hosts

# In a process of its own: what the import costs, and that nothing in the directory is run.
FRESH = """
import sys, mergekit_moe_ext, torch
unwanted = ("transformers.models.vit.", "transformers.models.t5.")
assert not {name for name in sys.modules if name.startswith(unwanted)}
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSeq2SeqLM
assert type(AutoConfig.from_pretrained("vit")).__name__ == "WEMoEViTConfig"
assert "transformers.models.vit.modeling_vit" not in sys.modules
for name, auto in {"vit": AutoModelForImageClassification, "t5": AutoModelForSeq2SeqLM}.items():
    model, info = auto.from_pretrained(name, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        torch.save(model(**torch.load(f"{name}.pt"))[0], f"{name}-logits.pt")
assert not {name for name in sys.modules if name.startswith("transformers_modules")}
"""


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family_loads_by_the_auto_class_of_its_base(tmp_path, family):
    model, inputs = build(family), inputs_of(family)
    model.save_pretrained(tmp_path)
    stock_class, config = FAMILIES[family]
    assert type(AutoConfig.from_pretrained(tmp_path)) is config_class(type(config))
    auto = getattr(transformers, auto_class_of(stock_class.__name__))
    for options in ({}, {"trust_remote_code": True}):
        loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True, **options)
        assert type(loaded) is model_class(stock_class) and not any(info.values())
        assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])
    assert type(auto.from_config(AutoConfig.from_pretrained(tmp_path))) is model_class(stock_class)


def test_importing_is_cheap_and_runs_no_code_from_the_directory(tmp_path):
    expected = {}
    for name in ("vit", "t5"):
        build(name).save_pretrained(tmp_path / name)
        torch.save(inputs_of(name), tmp_path / f"{name}.pt")
        with torch.no_grad():
            expected[name] = build(name)(**inputs_of(name))[0]
    done = run(sys.executable, "-c", FRESH, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for name, logits in expected.items():
        assert torch.equal(torch.load(tmp_path / f"{name}-logits.pt"), logits)


@pytest.mark.parametrize("options", [{}, {"trust_remote_code": True}])
@torch.no_grad()
def test_pipelines_find_model_tokenizer_and_processor(tmp_path, options):
    text, image = tmp_path / "text", tmp_path / "image"
    model = build("llama")
    model.save_pretrained(text)
    save_tokenizer(text, 64)
    generate = pipeline("text-generation", str(text), **options)
    assert type(generate.model) is type(model)
    made = generate("w1 w2 w3", max_new_tokens=4, do_sample=False, return_tensors=True)[0][
        "generated_token_ids"
    ]
    ids = AutoTokenizer.from_pretrained(text)("w1 w2 w3", return_tensors="pt")["input_ids"]
    assert made == model.generate(ids, max_new_tokens=4, do_sample=False)[0].tolist()

    model = build("vit")
    model.config.id2label = dict(enumerate("abcd"))
    model.save_pretrained(image)
    ViTImageProcessor(size={"height": 12, "width": 12}).save_pretrained(image)
    picture = Image.effect_noise((20, 20), 90).convert("RGB")
    found = pipeline("image-classification", str(image), top_k=4, **options)(picture)
    pixels = AutoImageProcessor.from_pretrained(image)(picture, return_tensors="pt")["pixel_values"]
    for name, score in zip("abcd", model(pixels).logits[0].softmax(-1), strict=True):
        assert next(each["score"] for each in found if each["label"] == name) == pytest.approx(
            score.item(), abs=1e-6
        )


@pytest.mark.parametrize(
    "auto", [AutoModel, AutoModelForSequenceClassification, AutoModelForImageClassification]
)
def test_another_auto_class_says_which_is_right(tmp_path, auto):
    build("llama").save_pretrained(tmp_path)
    for load in (
        auto.from_pretrained,
        lambda path: auto.from_config(AutoConfig.from_pretrained(path)),
    ):
        with pytest.raises(
            ValueError, match="this is a WEMoELlamaForCausalLM, which AutoModelForCausalLM loads"
        ):
            load(tmp_path)


def test_a_subclass_of_a_users_own_loads(tmp_path):
    build("llama").save_pretrained(tmp_path)
    mine = type("Mine", (model_class(LlamaForCausalLM),), {})
    assert type(mine.from_pretrained(tmp_path)) is mine


@pytest.mark.parametrize("experts", [None, 8, []])
def test_another_packages_sequence_moe_is_not_taken_for_ours(tmp_path, experts):
    """transformers prefers code that is installed to a repository's own, even where that is
    trusted.
    """
    config = {
        "model_type": "sequence_moe",
        "architectures": ["TheirModel"],
        "auto_map": {"AutoConfig": "theirs.TheirConfig", "AutoModelForCausalLM": "theirs.Theirs"},
    }
    if experts is not None:
        config["experts"] = experts
    (tmp_path / "config.json").write_text(json.dumps(config))
    for trusted in (None, True):
        with pytest.raises(
            ValueError, match=r"this TheirModel has .*TORCH_DEVICE_BACKEND_AUTOLOAD"
        ):
            AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trusted)


def test_transformers_own_registries_work_as_before():
    assert "wemoe_vit" in CONFIG_MAPPING and CONFIG_MAPPING["wemoe_vit"] is config_class(ViTConfig)
    for name in ("wemoe_nothing", "wemoe_", "wemoe_wemoe_vit", "nothing", None):
        assert name not in CONFIG_MAPPING
    with pytest.raises(KeyError):
        CONFIG_MAPPING["wemoe_nothing"]
    assert CONFIG_MAPPING["sequence_moe"].model_type == "sequence_moe"
    assert set(CONFIG_MAPPING) == set(CONFIG_MAPPING.keys()) >= {"vit", "wemoe_vit", "sequence_moe"}
    models = AutoModelForCausalLM._model_mapping
    assert models[LlamaConfig] is LlamaForCausalLM and PretrainedConfig not in models
    assert isinstance(AutoConfig.for_model("wemoe_llama"), config_class(LlamaConfig))

    theirs = type("TheirConfig", (PretrainedConfig,), {"model_type": "theirs"})
    model = type("TheirModel", (LlamaForCausalLM,), {"config_class": theirs})
    AutoConfig.register("theirs", theirs)
    AutoModelForCausalLM.register(theirs, model)
    assert CONFIG_MAPPING["theirs"] is theirs and models[theirs] is model


def test_a_part_of_another_model_has_no_auto_class():
    """AutoModelForCausalLM names Mllama's decoder, and does not take the decoder's config."""
    with pytest.raises(ValueError, match=r"none of .* loads a MllamaForCausalLM"):
        auto_class_of("MllamaForCausalLM")
