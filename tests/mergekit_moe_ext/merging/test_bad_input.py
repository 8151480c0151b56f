"""Every mistake gets one clear message before any work, and leaves nothing behind."""

import json
import shutil
from pathlib import Path

import click
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from mergekit_moe_ext import UserError, plan
from tests.conftest import document, make_model, merge, read_tensors, run

PLAIN = {"format": "pt"}


def refused(here, config, *fragments, **options):
    before = sorted(path.name for path in here.iterdir())
    with pytest.raises(click.ClickException) as caught:
        merge(config, **options)
    for fragment in fragments:
        assert fragment in caught.value.message, caught.value.message
    assert "\n" not in caught.value.message
    assert sorted(path.name for path in here.iterdir()) == before


@pytest.mark.parametrize(
    ("config", "fragments"),
    [
        (document(dtipe="float32"), ["`dtipe`", "did you mean `dtype`"]),
        (document(gate_mode="random"), ["`gate_mode`", "the configuration"]),
        (
            document(models=[{"model": "./base", "paramaters": {}}]),
            ["`paramaters`", "models[0]", "`parameters`"],
        ),
        (document(tokenizer={"sauce": "union"}), ["`sauce`", "tokenizer", "`source`"]),
        (
            document(tokenizer={"tokens": {"a": {"sorce": "./math"}}}),
            ["`sorce`", "'a'", "`source`"],
        ),
        (
            document(tokenizer={"tokens": {"a": {"source": {"model": "./math", "token": "b"}}}}),
            ["unknown key `token` in tokenizer: tokens: 'a': source", "kind"],
        ),
        (
            document(tokenizer={"tokens": {"a": {"source": {"kind": "zeros", "model": "./math"}}}}),
            ["kind: 'zeros'", "did you mean `zero`"],
        ),
        (
            document(
                tokenizer={"tokens": {"a": {"source": {"kind": "model_token", "model": "./math"}}}}
            ),
            ["'a': source takes one of `token` and `token_id`"],
        ),
        (document(parameters={"gate_mod": "random"}), ["`gate_mod`", "did you mean `gate_mode`"]),
        (document(parameters={"density": 0.5}), ["`density`", "moe_linear", "linear"]),
        (document("moe_ties", parameters={"densty": 0.5}), ["`densty`", "did you mean `density`"]),
        (
            document("moe_ties", models=[{"model": "./math", "parameters": {"wieght": 1.0}}]),
            ["`wieght`", "models[0]", "did you mean `weight`"],
        ),
        (
            document("moe_ties", models=[{"model": "./math", "parameters": {"normalize": False}}]),
            ["`normalize`", "models[0]", "belongs under the merge's `parameters:`"],
        ),
        (
            document(models=["base", {"model": "./math", "parameters": {"gate_mode": "zeros"}}]),
            ["`gate_mode`", "models[1]", "belongs under the merge's"],
        ),
        (document(parameters={"shared": "ties"}), ["`shared`"]),  # moe_linear has fixed it
        (document("moe", parameters={"shared": "tise"}), ["'tise'", "did you mean `ties`"]),
        (document("moe", parameters={"shared": "moe_ties"}), ["'moe_ties' is not a tensor method"]),
        (document(parameters={"gate_mode": "rand"}), ["`gate_mode`", "'rand'", "uniform_random"]),
        (document(parameters={"experts_per_token": "two"}), ["`experts_per_token`", "'two'"]),
        (
            document(parameters={"experts_per_token": 0}),
            ["`experts_per_token`", "greater than or equal to 1"],
        ),
        (document(parameters={"experts_per_token": 5}), ["experts_per_token is 5", "at most 4"]),
        (document(parameters={"experts_per_token": [1, 2]}), ["`experts_per_token`"]),
        (document(dtype="float31"), ["dtype", "float31", "float32"]),
        (document(out_dtype="int64"), ["out_dtype", "int64", "float32"]),
        (
            document("moe_dare", parameters={"density": 80}),
            ["dare cannot merge", "80", "less than or equal to 1"],
        ),
        (
            document("moe_ties", parameters={"density": float("nan")}),
            ["fast_ties cannot merge", "nan"],
        ),
        (document("moe_ties", parameters={"density": -0.5}), ["greater than or equal to 0"]),
        (document(parameters={"weight": float("nan")}), ["NaN or Inf", "allow_nonfinite"]),
        (
            document(parameters={"experts_per_token": [{"filter": "mlp", "value": 1}]}),
            ["`experts_per_token`", "takes one value"],
        ),
        (document(tokenizer_source="./nowhere"), ["'./nowhere' is neither union, base nor"]),
        (document(tokenizer_source="union"), ["./base has no tokenizer"]),
        (document(chat_template="chatlm"), ["chat_template: 'chatlm'", "did you mean `chatml`?"]),
        (document(chat_template="./my.jinja"), ["'./my.jinja'", "Jinja", "known here: auto, alp"]),
        (document(chat_template="{{ messages }}"), ["'{{ messages }}'", "at least 20 characters"]),
        (
            document(chat_template="{{ bos_token }}\n{% for message in messages %}\n{% end %}"),
            ["chat_template: line 3 of the template is not Jinja", "'end'", "'endfor'"],
        ),
        (document("moe_ties", base=None), ["fast_ties", "requires a base", "base_model:"]),
        (document("moe", parameters={"shared": "slerp", "t": 0.5}), ["slerp", "got 4"]),
        (
            document("moe", models=["base", "math"], parameters={"shared": "slerp"}),
            ["slerp needs `t`"],
        ),
        (document("moe_ties", parameters={"density": "much"}), ["fast_ties cannot merge", "much"]),
        (document(models=["base", "./nowhere"]), ["./nowhere does not exist"]),
        (document(base="./nowhere"), ["./nowhere does not exist"]),
        (document(models=["base", {"model": "./math+./lora"}]), ["./lora does not exist"]),
        (
            document(models=["base", {"model": "./math+./code"}]),
            ["./code", "is no LoRA", "adapter_config.json"],
        ),
        (
            document(models=["math", {"model": "./math", "parameters": {"weight": 2.0}}]),
            ["./math", "more than once", "agree"],
        ),
        (
            {
                "merge_method": "moe_linear",
                "slices": [{"sources": [{"model": "./base", "layer_range": [0, 1]}]}],
            },
            ["`models:`", "not slices"],
        ),
    ],
)
def test_configuration(here, config, fragments):
    for entry in config.get("models", []):
        entry["model"] = entry["model"].replace("././", "./")
    refused(here, config, *fragments)


@pytest.mark.parametrize(
    ("config", "fragments"),
    [
        (document("moe_tie"), ["'moe_tie' is not a merge method", "did you mean `moe_ties`"]),
        (document("slerpp"), ["'slerpp' is not a merge method", "did you mean `slerp`"]),
        (document("fast_ties"), ["fast_ties needs `weight`"]),
        (document("dare", parameters={"densty": 0.5}), ["`densty`", "did you mean `density`"]),
        (
            document("dare", models=[{"model": "./math", "parameters": {"rescale": True}}]),
            ["`rescale`", "models[0].parameters (dare)"],
        ),
        (document("dare", dtipe="float32"), ["`dtipe`", "did you mean `dtype`"]),
        (document("dare", base=None), ["dare", "requires a base"]),
        (document("dare", parameters={"density": 80}), ["dare cannot merge", "80", "equal to 1"]),
        (document("dare", parameters={"density": "much"}), ["dare cannot merge", "much"]),
        (document("dare", parameters={"allow_nonfinite": "yes"}), ["'yes'", "true nor false"]),
        (document("dare", out_dtype="int64"), ["out_dtype", "int64", "float32"]),
        (document("dare", chat_template="lama3"), ["'lama3'", "did you mean `llama3`?"]),
        (document("dare", models=["math", "./nowhere"]), ["./nowhere does not exist"]),
        (
            document("dare", tokenizer_source="./maths"),
            ["tokenizer_source: './maths' is neither union, base nor", "did you mean `./math`"],
        ),
        (
            document("dare", tokenizer={"tokens": {"for": {"source": "./cdoe"}}}),
            ["tokenizer: tokens: 'for': source: './cdoe'", "did you mean `./code`"],
        ),
        (
            {
                "merge_method": "dare",
                "base_model": "./base",
                "slices": [
                    {
                        "parameters": {"wieght": 2.0},
                        "sources": [
                            {"model": "./base", "layer_range": [0, 1]},
                            {"model": "./math", "layer_range": [0, 1]},
                        ],
                    }
                ],
            },
            ["`wieght`", "slices[0].parameters (dare)", "did you mean `weight`"],
        ),
    ],
)
def test_configuration_of_a_dense_merge(here, config, fragments):
    for entry in config.get("models", []):
        entry["model"] = entry["model"].replace("././", "./")
    refused(here, config, *fragments)


@pytest.mark.parametrize(
    ("config", "fragments"),
    [
        ({"hidden_size": 64}, ["./odd", "`hidden_size` is 64, not 32"]),
        ({"num_hidden_layers": 2}, ["`num_hidden_layers` is 2, not 3"]),
        ({"num_key_value_heads": 4}, ["`num_key_value_heads` is 4, not 2"]),
        ({"hidden_act": "gelu"}, ["`hidden_act` is 'gelu', not 'silu'"]),
        ({"vocab_size": 80}, ["`vocab_size` is 80, not 96", "tokenizer: {source: union}"]),
        ({"attention_bias": True}, ["./odd", "`attention_bias` is True, not False"]),
        ({"mlp_bias": True}, ["./odd", "`mlp_bias` is True, not False"]),
        (
            {"family": "qwen3"},
            ["./odd", "model_type is 'qwen3', not 'llama'", "--allow-crimes"],
        ),
        (
            {"family": "mistral", "sliding_window": 16},
            ["./odd (mistral) and ./base (llama)", "`sliding_window` is 16", "--allow-crimes"],
        ),
    ],
)
def test_source_of_another_shape(here, config, fragments):
    make_model(here / "odd", 1, **config)
    refused(here, document(models=["base", "odd"]), *fragments)


def test_mistral_and_llama_mix_when_asked_to(here):
    make_model(here / "odd", 1, family="mistral", sliding_window=16)
    assert (merge(document(models=["base", "odd"]), allow_crimes=True) / "config.json").exists()


def test_unsupported_family_names_the_supported(here):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16)).save_pretrained(
        here / "gpt"
    )
    refused(
        here,
        document(
            models=["gpt"], base=None, parameters={"experts_per_token": 1, "architecture": "stock"}
        ),
        "GPT2LMHeadModel",
        "LlamaForCausalLM (to MixtralForCausalLM or GraniteMoeForCausalLM)",
        "MistralForCausalLM",
    )


@pytest.fixture
def damaged(here):
    """./damaged: a copy of ./math that a test may spoil."""
    shutil.copytree(here / "math", here / "damaged")
    return here / "damaged"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", []),
        ("rms_norm_eps", "x"),
        ("attention_dropout", float("nan")),
        ("architectures", [-0.5]),
        ("num_hidden_layers", 10**9),
    ],
)
def test_a_config_with_a_wrong_value(here, key, value):
    make_model(here / "odd", 1)
    path = here / "odd" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    refused(here, document(models=["odd", "math"]), "the config of ./odd", key)


@pytest.mark.parametrize("inside", ["checkpoint-100", "snapshots/0123"])
def test_a_directory_of_models_is_no_model(here, inside):
    shutil.copytree(here / "math", here / "run" / inside)
    for method in ("moe_linear", "dare"):
        refused(
            here,
            document(method, models=["base", "run"]),
            "./run has no config.json: it is not a model; run/",
            f"{inside} has one",
        )


def test_names_of_a_wrapper_in_a_dense_merge(here, damaged):
    tensors = load_file(damaged / "model.safetensors")
    wrapped = {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}
    save_file(wrapped, damaged / "model.safetensors", PLAIN)
    fragments = ["./damaged does not hold it", "have `_orig_mod.` in them, as torch.compile leaves"]
    refused(here, document("dare", models=["damaged"]), *fragments)


def test_a_config_by_which_no_model_can_be_built(here):
    make_model(here / "odd", 1)
    path = here / "odd" / "config.json"
    rope = {"rope_theta": {"a": 1}, "rope_type": "default"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "rope_parameters": rope}))
    refused(here, document("seq_moe", models=["odd"], base=None), "by the config of ./odd")


def test_missing_shard(here, damaged):
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(damaged).save_pretrained(damaged, max_shard_size="20KB")
    (damaged / "model.safetensors").unlink()
    shard = sorted(damaged.glob("model-*"))[1]
    shard.unlink()
    refused(here, document(models=["base", "damaged"]), shard.name, "is missing", "./damaged")


def test_an_index_that_does_not_fit_its_shards(here, damaged):
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(damaged).save_pretrained(damaged, max_shard_size="20KB")
    (damaged / "model.safetensors").unlink()
    index = damaged / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    names = content["weight_map"]
    shards = list(names.values())
    moved = min(name for name in names if shards.count(names[name]) > 1)
    names[moved] = next(shard for shard in shards if shard != names[moved])
    index.write_text(json.dumps(content))
    refused(here, document(models=["base", "damaged"]), moved, "the index of ./damaged")
    del names[moved]
    index.write_text(json.dumps(content))
    expected = f"holds {moved}, which the index of ./damaged does not name"
    refused(here, document(models=["base", "damaged"]), expected)


def test_truncated_shard(here, damaged):
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    refused(here, document(models=["base", "damaged"]), "damaged")


def test_no_weights_and_no_config(here, damaged):
    (damaged / "model.safetensors").unlink()
    refused(here, document(models=["base", "damaged"]), "cannot read the weights of ./damaged")
    (damaged / "config.json").unlink()
    refused(here, document(models=["base", "damaged"]), "./damaged has no config.json")


@pytest.mark.parametrize("change", ["missing", "surplus", "shape", "dtype"])
def test_tensors_that_do_not_fit(here, damaged, change):
    tensors = load_file(damaged / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    if change == "missing":
        del tensors[name]
        fragments = ["./damaged lacks the tensor", name]
    elif change == "surplus":
        name = "model.layers.1.self_attn.q_proj.bias"
        tensors[name] = torch.zeros(32)
        fragments = [name, "./damaged", "has no place"]
    elif change == "dtype":
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        fragments = [name, "./damaged is F8_E4M3", "bfloat16"]
    else:
        tensors[name] = torch.zeros(32, 16)
        fragments = [name, "(32, 16)", "(32, 32)"]
    save_file(tensors, damaged / "model.safetensors", PLAIN)
    refused(here, document(models=["base", "damaged"]), *fragments)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.mlp.down_proj.weight"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nonfinite(here, damaged, value, name, dtype):
    tensors = {
        key: tensor.to(dtype) for key, tensor in load_file(damaged / "model.safetensors").items()
    }
    tensors[name].view(-1)[7] = value
    save_file(tensors, damaged / "model.safetensors", PLAIN)
    config = document(models=["base", "damaged"])
    refused(here, config, f"{name} of ./damaged holds NaN or Inf", "allow_nonfinite")
    out = merge({**config, "parameters": {"allow_nonfinite": True}})
    assert sum(not tensor.isfinite().all() for tensor in read_tensors(out).values()) == 1


@pytest.mark.parametrize("change", ["cut", "missing", "shape", "integers", "nan"])
def test_damaged_source_of_a_dense_merge(here, damaged, change):
    weights = damaged / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.1.self_attn.q_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "shape":
        tensors[name] = torch.zeros(32, 16)
    elif change == "integers":
        tensors[name] = tensors[name].int()
    elif change == "nan":
        tensors[name][0, 0] = float("nan")
    save_file(tensors, weights, PLAIN)
    if change == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
        name = "model.safetensors is damaged"
    config = document("dare", models=["math", "damaged"])
    refused(here, config, name)
    if change == "nan":
        out = merge({**config, "parameters": {"allow_nonfinite": True}})
        assert not read_tensors(out)[name].isfinite().all()


def test_quantised_source(here, damaged):
    config = json.loads((damaged / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (damaged / "config.json").write_text(json.dumps(config))
    refused(here, document(models=["base", "damaged"]), "./damaged is quantised")


@pytest.mark.parametrize("keys", [{"out_dtype": "float16"}, {"dtype": "float16"}])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.2.mlp.down_proj.weight"])
def test_values_that_do_not_fit_the_dtype(here, damaged, keys, name):
    tensors = load_file(damaged / "model.safetensors")
    tensors[name].view(-1)[7] = 4e5
    save_file(tensors, damaged / "model.safetensors", PLAIN)
    refused(
        here, document(models=["base", "damaged"], **keys), "values too large for torch.float16"
    )


def test_a_stored_head_that_is_not_the_embedding_it_is_tied_to(here):
    for name in ("tied", "odd"):
        make_model(here / name, 0, tie_word_embeddings=True)
    tensors = load_file(here / "odd" / "model.safetensors")
    copy = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(copy, here / "odd" / "model.safetensors", PLAIN)
    assert merge(document(models=["tied", "odd"], base=None), "fine").exists()
    save_file(
        {**copy, "lm_head.weight": torch.ones(96, 32)}, here / "odd" / "model.safetensors", PLAIN
    )
    refused(
        here,
        document(models=["tied", "odd"], base=None),
        "lm_head.weight of ./odd",
        "differs from model.embed_tokens.weight",
    )


def test_more_rows_than_the_vocabulary_has(here, damaged):
    tensors = load_file(damaged / "model.safetensors")
    tensors["lm_head.weight"] = torch.zeros(100, 32)
    save_file(tensors, damaged / "model.safetensors", PLAIN)
    refused(
        here, document(models=["damaged"] * 2, base=None), "lm_head.weight", "(100, 32)", "(96, 32)"
    )


@pytest.mark.parametrize("content", ["", "{", "{}", '{"weight_map": 3}'])
def test_damaged_index(here, damaged, content):
    (damaged / "model.safetensors").unlink()
    (damaged / "model.safetensors.index.json").write_text(content)
    refused(here, document(models=["base", "damaged"]), "cannot read the weights of ./damaged")


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04"])
def test_damaged_pickle(here, damaged, content):
    (damaged / "model.safetensors").unlink()
    (damaged / "pytorch_model.bin").write_bytes(content)
    refused(here, document(models=["base", "damaged"]), "cannot read the weights of ./damaged")


def test_a_lora_listed_as_a_model(here):
    (here / "lora").mkdir()
    (here / "lora" / "adapter_config.json").write_text("{}")
    refused(here, document(models=["base", "lora"]), "./lora is a LoRA", "BASE+./lora")


def test_output_below_a_file(here):
    refused(here, document(), "cannot write", out="base/config.json/out")


def test_output_that_is_there_already(here):
    (here / "out").mkdir()
    (here / "out" / "thesis.txt").write_text("mine")
    refused(here, document(), "out is not empty")
    assert (here / "out" / "thesis.txt").read_text() == "mine"
    refused(here, document(), "is a file", out="out/thesis.txt")


def test_an_empty_output_directory_is_fine(here):
    (here / "out").mkdir()
    assert (merge(document()) / "model.safetensors").exists()


def test_the_real_command_prints_one_line_and_no_traceback(here):
    import yaml

    (here / "bad.yml").write_text(yaml.safe_dump(document(parameters={"gate_mod": "zeros"})))
    result = run("mergekit-yaml", "bad.yml", "out")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "Error: unknown key `gate_mod`" in result.stderr
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("modles: []\nmerge_method: moe", "`models`?"),
        ("merge_metod: moe\nmodels: [{model: ./base}]", "did you mean `merge_method`"),
        ("merge_method: [", "bad.yml"),
        ("- 1", "not a mapping"),
        ("merge_method: moe", "models"),
        ("merge_method: moe\nmodels: 0.5", "models"),
        ("merge_method: moe_tie\nmodels: [{model: ./base}]", "did you mean `moe_ties`"),
        ("merge_method: moe\nmodels: [{model: ./base}]\nparameters: {shared: {a: 1}}", "shared"),
    ],
)
def test_our_command_explains_what_mergekit_would_raise(here, text, fragment):
    from click.testing import CliRunner

    from mergekit_moe_ext.cli import main

    (here / "bad.yml").write_text(text)
    result = CliRunner().invoke(main, ["yaml", "bad.yml", "out"])
    assert result.exit_code == 1 and fragment in result.output
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize("method", ["moe_linear", "dare"])
@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"device": "foo"}, ["no device 'foo' here", "leave --device foo out"]),
        ({"device": "meta"}, ["'meta'", "leave --device meta out"]),
        ({"cuda": True}, ["no device 'cuda' here", "leave --cuda out"]),
        ({"multi_gpu": True}, ["no GPU here: leave --multi-gpu out"]),
        ({"gpu_rich": True}, ["no GPU here: leave --gpu-rich out"]),
    ],
)
def test_a_device_that_is_not_there(here, method, options, fragments):
    if torch.accelerator.is_available() and "device" not in options:
        pytest.skip("there is one")
    refused(here, document(method, models=["./nowhere"]), *fragments, **options)


@pytest.mark.parametrize("command", [["plan", "good.yml"], ["yaml", "good.yml", "out"]])
def test_options_that_mergekit_would_refuse_by_a_traceback(here, command):
    from click.testing import CliRunner

    from mergekit_moe_ext.cli import main

    (here / "good.yml").write_text("merge_method: moe\nmodels: [{model: ./base}, {model: ./math}]")
    for options, fragment in (
        (["--device", "foo"], "leave --device foo out"),
        (["--out-shard-size", "5GB"], "'5GB' is no number of parameters, such as 500M or 5B"),
    ):
        result = CliRunner().invoke(main, [*command, *options])
        assert fragment in result.output
        assert isinstance(result.exception, SystemExit)
    assert not (here / "out").exists()


def test_a_weight_that_the_shared_method_does_not_have_is_a_warning(here, caplog):
    """As mergekit ignores it under a method that has none."""
    plain = document("moe", ["base", "math"], parameters={"shared": "karcher"})
    weighed = document(
        "moe",
        ["base", {"model": "./math", "parameters": {"weight": 0.3}}],
        parameters={"shared": "karcher"},
    )
    expected = read_tensors(merge(plain, "plain"))
    got = read_tensors(merge(weighed, "weighed"))
    assert "karcher has no `weight`: that of models[1].parameters counts nothing" in caplog.text
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("entry", ["./math", "model ./math"])
@pytest.mark.parametrize("method", ["moe_linear", "linear"])
def test_a_bare_path_among_the_models(here, method, entry):
    config = {"merge_method": method, "models": [{"model": "./base"}, entry]}
    Path("config.yml").write_text(yaml.safe_dump(config))
    for command in (
        ["mergekit-yaml", "config.yml", "out"],
        ["mergekit-moe-ext", "plan", "config.yml"],
    ):
        result = run(*command)
        assert result.returncode == 1
        assert f"models[1] is '{entry}': write `- model: ./math`" in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("parameters", "fragments"),
    [
        ({"density": 80}, ["`density: 80` under parameters", "less than or equal to 1"]),
        ({"density": [0.5, 1.5]}, ["`density: 1.5`"]),
        ({"density": [{"filter": "mlp", "value": "hello"}]}, ["`density: hello`", "valid number"]),
        ({"normalize": "maybe"}, ["`normalize: maybe`", "boolean"]),
    ],
)
def test_values_of_the_shared_method_are_checked_by_plan(here, parameters, fragments):
    for method in ("moe_ties", "moe"):
        shared = {"shared": "fast_ties"} if method == "moe" else {}
        with pytest.raises(UserError) as caught:
            plan(document(method, parameters={**parameters, **shared}))
        for fragment in fragments:
            assert fragment in caught.value.message, caught.value.message
