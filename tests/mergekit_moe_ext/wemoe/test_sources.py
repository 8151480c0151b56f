"""Bases of `wemoe` that are stored in another form than they are used in, or are of another class
than the sources.
"""

import json
from pathlib import Path

import click
import pytest
import torch
import transformers
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
)

from mergekit_moe_ext.merging.joined import joined_tensors
from mergekit_moe_ext.merging.manifest import hub_state
from tests.conftest import document, merge, read_tensors
from tests.tokenizers import save_tokenizer

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SWIGLU = {**SIZES, "mlp_ratio": 2, "image_size": 8, "patch_size": 4, "use_swiglu_ffn": True}
PIXELS = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def save_fine_tunes(base, names):
    """Saves the base and fine-tunes of it, and returns the state of each, the base's first."""
    states = []
    noise = torch.Generator().manual_seed(0)
    start = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for name in ("base", *names):
        base.load_state_dict(start)
        with torch.no_grad():
            for parameter in base.parameters() if name != "base" else ():
                parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
        base.save_pretrained(name)
        states.append({key: value.clone() for key, value in base.state_dict().items()})
    return states


@pytest.fixture
def swiglu(tmp_path, monkeypatch):
    """A base and two sources in whose files the gate and the up projection are one tensor."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    states = save_fine_tunes(Dinov2Model(Dinov2Config(**SWIGLU)), ["one", "two"])
    assert "encoder.layer.0.mlp.weights_in.weight" in read_tensors(tmp_path / "base")
    return states


def test_the_parts_of_joined_tensors_are_those_that_transformers_loads(swiglu):
    config = Dinov2Config.from_pretrained("base")
    model = Dinov2Model.from_pretrained("base")
    stored = read_tensors(Path("base"))
    joined = joined_tensors(*hub_state(config))
    assert set(joined) == {name for name in stored if "weights_in" in name}
    for name, derivation in joined.items():
        parts = dict(zip(derivation.names, derivation.make(stored[name]), strict=True))
        assert torch.equal(parts.pop(name), stored[name]) and len(parts) == 2
        for part, tensor in parts.items():
            assert torch.equal(tensor, model.state_dict()[part])


@pytest.mark.parametrize("method", ["wemoe", "ewemoe"])
@torch.no_grad()
def test_joined_tensors_are_ensembled_apart(swiglu, method):
    parameters = {"lambda": 0.3, "init_lambda": 0.3, "router_layers": 0, "sparsity": 0.0}
    merge(document(method, ["one", "two"], "./base", parameters=parameters), "out")
    base, one, two = swiglu
    expected = Dinov2Model(Dinov2Config(**SWIGLU)).eval()
    expected.load_state_dict(
        {name: base[name] + 0.3 * (one[name] + two[name] - 2 * base[name]) for name in base}
    )
    model = AutoModel.from_pretrained("out").eval()
    difference = model(PIXELS).last_hidden_state - expected(PIXELS).last_hidden_state
    assert difference.abs().max() < 1e-5
    model.save_pretrained("again")
    again = AutoModel.from_pretrained("again").eval()
    assert torch.equal(again(PIXELS).last_hidden_state, model(PIXELS).last_hidden_state)


def test_a_part_that_is_merged_with_the_rest_is_not_left_as_the_base_s(swiglu, monkeypatch):
    def without_gates(network, *_):
        return {"encoder.layer.0.mlp": ["encoder.layer.0.mlp.up_proj"]}

    monkeypatch.setattr("mergekit_moe_ext.wemoe.method.ensembled_groups", without_gates)
    with pytest.raises(click.ClickException, match=r"gate_proj.* would not be upscaled"):
        merge(document("wemoe", ["one", "two"], "./base", parameters={}), "out")


def follow_the_advice(error):
    """Runs the Python line that an error gives, and returns the directory that it writes."""
    line = "transformers." + str(error.value).rpartition("transformers.")[2]
    exec(line, {"transformers": transformers})
    return json.loads(line.rpartition("save_pretrained(")[2].removesuffix(")"))


def test_the_tower_of_a_whole_clip_is_made_as_the_error_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    side = {**SIZES, "intermediate_size": 24}
    towers = {"vision_config": {**side, "image_size": 8, "patch_size": 4}}
    texts = {"text_config": {**side, "vocab_size": 96, "max_position_embeddings": 8}}
    CLIPModel(CLIPConfig(**towers, **texts, projection_dim=8)).save_pretrained("whole")
    save_fine_tunes(CLIPVisionModel.from_pretrained("whole"), ["one", "two"])
    with pytest.raises(click.ClickException, match="one class") as error:
        merge(document("wemoe", ["one", "two"], "./whole", parameters={}), "out")
    base = follow_the_advice(error)
    merge(document("wemoe", ["one", "two"], base, parameters={}), "out")
    assert AutoModel.from_pretrained("out").eval()(PIXELS).last_hidden_state.isfinite().all()


@torch.no_grad()
def test_classifiers_are_merged_on_their_language_model_as_the_error_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 2
    GPT2LMHeadModel(config).save_pretrained("base")
    save_tokenizer("base", 96)
    tokens = torch.tensor([[5, 6, 7]])
    expected = {}
    for task, classes in {"tone": ["bad", "good"], "topic": ["law", "news", "code"]}.items():
        names = dict(enumerate(classes))
        source = GPT2ForSequenceClassification.from_pretrained("base", id2label=names).eval()
        source.score.weight.normal_()
        source.save_pretrained(task)
        save_tokenizer(task, 96)
        # The trunks are the base's, so that each task's logits are those of its source.
        expected[task] = source(tokens).logits
    with pytest.raises(click.ClickException, match="one class") as error:
        merge(document("wemoe", ["tone", "topic"], "./base", parameters={}), "out")
    base = follow_the_advice(error)
    save_tokenizer(base, 96)
    merge(document("wemoe", ["tone", "topic"], base, parameters={}), "out")
    model = transformers.AutoModelForSequenceClassification.from_pretrained("out").eval()
    for task, logits in expected.items():
        assert torch.allclose(model(tokens, task=task).logits, logits, atol=1e-5)


def test_no_base_is_advised_that_would_have_a_random_head(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = GPT2Config(vocab_size=96, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    GPT2ForSequenceClassification(config).save_pretrained("base")
    GPT2LMHeadModel(config).save_pretrained("one")
    with pytest.raises(click.ClickException, match=r"must be one class$"):
        merge(document("wemoe", ["one"], "./base", parameters={}), "out")
