"""Configurations in the form of mergekit-moe, against what that command itself writes."""

import click
import pytest
import torch
import yaml
from click.testing import CliRunner
from mergekit.config import MergeConfiguration
from mergekit.moe.config import MoEMergeConfig
from mergekit.options import MergeOptions
from mergekit.scripts.moe import build
from transformers import AutoModelForCausalLM

from mergekit_moe_ext import plan
from mergekit_moe_ext.cli import main
from mergekit_moe_ext.merging.mergekit_moe import converted
from tests.conftest import make_model, read_tensors
from tests.tokenizers import save_tokenizer


def configuration(gate_mode="cheap_embed", family="llama", **keys):
    shared = {"shared_experts": [{"source_model": "base", "positive_prompts": ["w1"]}]}
    return {
        "base_model": "base",
        "gate_mode": gate_mode,
        "dtype": "float32",
        "experts": [
            {"source_model": "math", "positive_prompts": ["w1 w2", "w3"]},
            {
                "source_model": "code",
                "positive_prompts": ["w4 w5 w6"],
                "negative_prompts": ["w20"],
            },
        ],
        **(shared if family == "qwen2" else {}),
        **keys,
    }


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A function that makes base, math and code of a family in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def make(family="llama", **config):
        for seed, name in enumerate(("base", "math", "code")):
            make_model(tmp_path / name, seed, family=family, tie_word_embeddings=False, **config)
            save_tokenizer(tmp_path / name, 96, bos_token="</s>")
        return tmp_path

    return make


@pytest.mark.parametrize("gate_mode", ["cheap_embed", "hidden", "random"])
def test_a_mixtral_is_that_of_mergekit_moe(models, gate_mode):
    where = models()
    document = configuration(gate_mode)
    build(
        MoEMergeConfig.model_validate(document),
        "theirs",
        MergeOptions(write_model_card=False, quiet=True),
        device="cpu",
    )
    (where / "moe.yml").write_text(yaml.safe_dump(document))
    result = CliRunner().invoke(main, ["yaml", "moe.yml", "ours", "--quiet"])
    assert result.exit_code == 0 and "merge_method: moe" in result.output
    theirs, report = AutoModelForCausalLM.from_pretrained("theirs", output_loading_info=True)
    assert not any(report.values())
    ours = AutoModelForCausalLM.from_pretrained("ours").state_dict()
    assert ours.keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        if "gate.weight" not in name:
            assert torch.equal(ours[name], tensor), name
        elif gate_mode == "cheap_embed":
            assert torch.allclose(ours[name], tensor, atol=1e-6), name
    card = (where / "ours" / "mergekit_config.yml").read_text()
    assert "# Converted from the form of mergekit-moe" in card


@pytest.mark.parametrize(
    ("family", "expert"),
    [
        ("qwen2", "shared_expert"),
        ("hunyuan_v1_dense", "shared_mlp"),
        ("ernie4_5", "shared_experts"),
        ("glm", "shared_experts"),
    ],
)
def test_a_shared_expert_is_passed_by_every_token(models, family, expert):
    """With experts that are zero the FFNs of a layer are the shared expert's, by its gate."""
    where = models(family, **({"head_dim": 8} if family in ("hunyuan_v1_dense", "glm") else {}))
    (where / "moe.yml").write_text(yaml.safe_dump(configuration(family="qwen2")))
    result = CliRunner().invoke(main, ["yaml", "moe.yml", "ours", "--quiet"])
    assert result.exit_code == 0, result.output
    assert "the gate of the shared expert starts at zero" in result.output
    ours, base = read_tensors(where / "ours"), read_tensors(where / "base")
    for name in ("gate_proj", "up_proj", "down_proj"):
        place = f"model.layers.1.mlp.{expert}.{name}.weight"
        if family != "glm":  # whose projections are stored in one tensor
            assert torch.equal(ours[place], base[f"model.layers.1.mlp.{name}.weight"])
    model, report = AutoModelForCausalLM.from_pretrained("ours", output_loading_info=True)
    assert not any(report.values())
    block = model.model.layers[1].mlp
    states = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        block.experts.down_proj.zero_()
        given = block(states)
        dense = AutoModelForCausalLM.from_pretrained("base").model.layers[1].mlp(states)
    given = given[0] if isinstance(given, tuple) else given
    share = 0.5 if family == "qwen2" else 1.0  # a gate of zero lets half through
    assert torch.allclose(given.reshape(dense.shape), share * dense, atol=1e-6)


def test_a_plan_shows_what_is_run(models):
    where = models()
    (where / "moe.yml").write_text(yaml.safe_dump(configuration()))
    result = CliRunner().invoke(main, ["plan", "moe.yml"])
    assert result.exit_code == 0, result.output
    assert "MixtralForCausalLM" in result.output
    shown = result.output[result.output.index("# Converted") :]
    assert yaml.safe_load(shown) == converted(configuration())[0]


def test_an_architecture_that_is_left_out_is_said():
    _, source = converted(configuration(architecture="Mixtral"))
    assert "# architecture: Mixtral was left out" in source


def test_mergekit_yaml_says_what_runs_it():
    with pytest.raises(click.ClickException, match="mergekit-moe-ext yaml"):
        MergeConfiguration.model_validate(configuration())


WRONG = [
    ({"gate_modes": "hidden"}, "unknown key `gate_modes` in the configuration; did you mean"),
    ({"experts": [{"source_model": "a", "weight": 1}]}, r"unknown key `weight` in experts\[0\]"),
    ({"experts": [{"source_model": "a", "noise_scale": 0.1}]}, "`noise_scale` has no like here"),
    ({"architecture": "switch"}, "mergekit-moe has no 'switch'"),
    ({"architecture": "DeepSeek MoE"}, "not one of transformers"),
    ({"experts_per_token": "two"}, "experts_per_token: .* form of mergekit-moe"),
    ({"shared_experts": [{"source_model": "a"}] * 2}, "names 2 models"),
    ({"shared_experts": 1}, "`shared_experts` is not a list"),
    ({"architecture": 8}, "architecture: 8 is not a name"),
]


@pytest.mark.parametrize(("keys", "message"), WRONG, ids=str)
def test_what_has_no_like_is_refused(keys, message):
    with pytest.raises(click.ClickException, match=message):
        converted(configuration(**keys))


def test_a_family_without_a_shared_expert_refuses_one(models):
    models()
    document = configuration(shared_experts=[{"source_model": "base"}])
    with pytest.raises(click.ClickException, match="MixtralForCausalLM has no shared expert"):
        plan(document)
    document = configuration(shared_experts=[{"source_model": "other"}])
    with pytest.raises(click.ClickException, match="none of the models"):
        plan(document)


def test_a_generic_mixture_refuses_a_shared_expert(models):
    models("qwen2")
    parameters = {"architecture": "upcycled", "shared_expert": "./base"}
    document = {
        "merge_method": "moe",
        "models": [{"model": "./base"}] * 2,
        "parameters": parameters,
    }
    with pytest.raises(click.ClickException, match="is a generic mixture, which has no shared"):
        plan(document)
