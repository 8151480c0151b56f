"""What is written where the configuration names no dtype."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import document, make_model, merge, read_tensors
from tests.tokenizers import save_tokenizer

DTYPES = {"base": torch.bfloat16, "math": torch.float32, "code": torch.float16}
METHODS = {
    "moe_linear": {},
    "moe_ties": {"density": 0.8},
    "seq_moe": {"routing": "learned"},
    "seq_moe separate": {"embedding": "separate"},
    "hetero_moe": {"embedding": "separate"},
    "wemoe": {"lambda": 0.3},
    "ewemoe": {"lambda": 0.3, "sparsity": 0.5},
}


@pytest.mark.parametrize("named", METHODS)
def test_sources_of_several_dtypes_give_what_holds_them_all(tmp_path, monkeypatch, caplog, named):
    """The same tensors as of sources that were saved in float32 before."""
    monkeypatch.chdir(tmp_path)
    method, parameters = named.split()[0], METHODS[named]
    for seed, (name, dtype) in enumerate(DTYPES.items()):
        make_model(tmp_path / name, seed, dtype=dtype)
        wide = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
        wide.save_pretrained(tmp_path / "wide" / name)
        for directory in (tmp_path, tmp_path / "wide"):  # hetero_moe matches tokens
            save_tokenizer(directory / name, 96)
    models = list(DTYPES)[1:] if method.endswith("wemoe") else list(DTYPES)
    config = document(method, models, parameters=parameters)
    out = merge(config)
    assert "./base is bfloat16" in caplog.text and "the output is float32" in caplog.text
    monkeypatch.chdir(tmp_path / "wide")
    expected = read_tensors(merge({**config, "dtype": "float32"}))
    got = read_tensors(tmp_path / out)
    floating = {tensor.dtype for tensor in got.values() if tensor.is_floating_point()}
    assert floating == {torch.float32}
    assert json.loads((tmp_path / out / "config.json").read_text())["dtype"] == "float32"
    assert expected.keys() == got.keys() and all(
        torch.equal(expected[name], got[name]) for name in expected
    )


def test_tensors_of_another_dtype_than_the_rest_stay_and_are_named(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    name = "model.norm.weight"
    for seed, source in enumerate(("base", "math")):
        file = make_model(tmp_path / source, seed, dtype=torch.bfloat16) / "model.safetensors"
        tensors = load_file(file)
        save_file({**tensors, name: tensors[name].float()}, file, {"format": "pt"})
    got = read_tensors(merge(document(models=["base", "math"])))
    assert {key for key, tensor in got.items() if tensor.dtype == torch.float32} == {name}
    assert f"1 tensors of ./base are not bfloat16 like the rest ({name}, for one)" in caplog.text
    got = read_tensors(merge(document(models=["base", "math"], dtype="bfloat16"), "cast"))
    assert {tensor.dtype for tensor in got.values()} == {torch.bfloat16}
