"""The `moe` methods: what they write, compared with what cannot share their mistakes."""

import itertools
import json
import re
from pathlib import Path

import click
import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import mergekit_moe_ext
from mergekit_moe_ext.merging.card import drop_training_section
from tests.conftest import NAMES, document, make_model, merge, read_tensors, run, same_files

TOKENS = torch.arange(1, 41).reshape(2, 20) * 7 % 96
EXPERT_PARTS = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
PAPER = {"density": 0.8, "normalize": False, "lambda": 0.3333}


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model.eval()(tokens).logits


def without_ffn(tensors):
    return {name: tensor for name, tensor in tensors.items() if ".mlp." not in name}


@pytest.mark.parametrize(
    ("shared", "parameters"),
    [
        ("linear", {"weight": 1.0}),
        ("linear", {"weight": [0.1, 1.0], "normalize": False}),  # a gradient over the layers
        ("linear", {"weight": [{"filter": "q_proj", "value": [0.5, 2.0]}, {"value": 1.0}]}),
        ("ties", {"weight": 1.0, **PAPER}),
        (
            "ties",
            {
                "weight": [1.0, 0.2],
                "density": [{"filter": "self_attn", "value": 0.3}, {"value": 0.6}],
            },
        ),
        ("sce", {"select_topk": 0.5}),
        ("karcher", {}),
        ("task_arithmetic", {"weight": 0.7, "lambda": 0.5}),
        ("model_stock", {}),
    ],
)
def test_shared_parameters_are_the_stock_method_s_own(here, shared, parameters):
    stock = merge(document(shared, parameters=parameters, dtype="float32"), "stock")
    ours = merge(
        document("moe", parameters={"shared": shared, **parameters}, dtype="float32"), "ours"
    )
    expected, got = without_ffn(read_tensors(stock)), read_tensors(ours)
    assert len(expected) == 3 * 6 + 3
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def test_moe_ties_is_the_stock_ties_of_the_shared_parameters(here):
    stock = merge(document("ties", parameters={"weight": 1.0, **PAPER}, dtype="float32"), "stock")
    got = read_tensors(merge(document("moe_ties", parameters=PAPER, dtype="float32")))
    for name, tensor in without_ffn(read_tensors(stock)).items():
        assert torch.equal(got[name], tensor), name


def test_moe_ties_without_parameters_is_the_papers(here):
    """MergeME 3.1.2 in a plain loop over values: trim to 80 percent, elect the sign of the larger
    total magnitude, sum what agrees with it, and scale by 1/3 (appendix A). The base, an expert as
    well, is no task vector.
    """
    got = read_tensors(merge(document("moe_ties", dtype="float32")))
    base, *tuned = (read_tensors(here / name) for name in NAMES)
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.norm.weight"):
        start = base[name].flatten()
        trimmed = []
        for tensors in tuned:
            vector = (tensors[name].flatten() - start).tolist()
            in_order = sorted(range(len(vector)), key=lambda index: -abs(vector[index]))
            for index in in_order[int(0.8 * len(vector)) :]:
                vector[index] = 0.0
            trimmed.append(vector)
        expected = start.clone()
        for index, values in enumerate(zip(*trimmed, strict=True)):
            sign = 1 if sum(values) > 0 else -1
            expected[index] += sum(value for value in values if value * sign > 0) / 3
        torch.testing.assert_close(got[name].flatten(), expected)


def test_moe_dare_without_parameters_is_the_papers(here):
    """Every value of the update is a third of a sum over some of the sources' task vectors, each
    divided by 0.8; a fifth of all summands are left out.
    """
    got = read_tensors(merge(document("moe_dare", dtype="float32"), random_seed=1))
    base, *tuned = (read_tensors(here / name) for name in NAMES)
    name = "model.embed_tokens.weight"
    vectors = [tensors[name] - base[name] for tensors in tuned]
    distance = torch.full_like(base[name], torch.inf)
    number_kept = torch.zeros_like(base[name])
    for kept in itertools.product((0, 1), repeat=3):
        update = sum(k * vector / 0.8 / 3 for k, vector in zip(kept, vectors, strict=True))
        error = (got[name] - base[name] - update).abs()
        number_kept[error < distance] = sum(kept)
        distance = torch.minimum(distance, error)
    assert distance.max() < 1e-6
    assert abs(number_kept.mean() / 3 - 0.8) < 0.02


@pytest.mark.parametrize(
    ("method", "parameters", "line"),
    [
        ("moe_ties", {}, "by default: density 0.8, normalize false, lambda 0.3333"),
        ("moe_dare", {"density": 0.5}, "by default: lambda 0.3333"),
        ("moe_ties", {"density": 0.5, "normalize": True, "lambda": 1.0}, None),
        ("moe", {"shared": "fast_ties"}, None),
    ],
)
def test_defaults_are_in_the_plan_and_on_the_card(here, method, parameters, line):
    config = document(method, parameters=parameters)
    printed = str(mergekit_moe_ext.plan(config))
    card = (merge(config) / "README.md").read_text()
    for text in (printed, card):
        assert line in text if line else "by default" not in text


@pytest.mark.parametrize(
    ("method", "parameters", "state"),
    [
        ("moe", {}, "the gates are random until trained"),
        ("moe_linear", {"gate_mode": "uniform_random"}, "the gates are random until trained"),
        ("moe_ties", {"gate_mode": "zeros"}, "the gates are all 0 until trained"),
        ("moe_dare", {"architecture": "upcycled"}, "the gates are random until trained"),
        ("seq_moe", {"routing": "learned"}, "the router is random until trained"),
        ("seq_moe", {"routing": "perplexity"}, None),
    ],
)
def test_plan_and_card_say_what_must_be_trained(here, method, parameters, state):
    config = document(method, parameters=parameters)
    printed = str(mergekit_moe_ext.plan(config))
    out = merge(config)
    card = (out / "README.md").read_text()
    assert card.count("\n## ") == (3 if state else 2)
    if state is None:
        assert "until trained" not in printed + card
        return
    command = f"mergekit-moe-ext train out --train {state.split()[1]} --data "
    assert f"\nuntrained {state}: {command}" in printed
    assert f"## Train it first\n\n{state.capitalize()}:\n\n```sh\n{command}" in card
    drop_training_section(out, ["experts"])  # which leaves what is random as it is
    assert (out / "README.md").read_text() == card
    drop_training_section(out, [state.split()[1]])
    assert (out / "README.md").read_text() == re.sub(
        "## Train it first.*?(?=## Load it)", "", card, flags=re.DOTALL
    )


def test_moe_with_a_shared_method_keeps_that_methods_defaults(here):
    stated = {"density": 1.0, "normalize": True, "lambda": 1.0}
    got = read_tensors(merge(document("moe", parameters={"shared": "fast_ties"}), "got"))
    expected = read_tensors(merge(document("moe_ties", parameters=stated), "expected"))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_moe_dare_depends_on_the_random_seed(here):
    config = document("moe_dare", parameters={"density": 0.5})
    first, again, other = (
        merge(config, out, random_seed=seed) for out, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert same_files(first, again)
    name = "model.embed_tokens.weight"
    assert not torch.equal(read_tensors(first)[name], read_tensors(other)[name])


@pytest.mark.parametrize("shared", ["dare_linear", "dare_ties", "della"])
def test_random_shared_methods_equal_stock_per_tensor_from_the_same_generator_state(here, shared):
    from mergekit import merge_methods
    from mergekit.merge_methods import TensorGroup
    from mergekit.plan import ExecuteMergeMethodTask

    recorded = {}
    execute = ExecuteMergeMethodTask.execute

    def recording(task, *args, **kwargs):
        state = torch.get_rng_state()
        result = execute(task, *args, **kwargs)
        recorded[task.output_weight.name] = (state, result)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ExecuteMergeMethodTask, "execute", recording)
        parameters = {"shared": shared, "weight": 0.5, "density": 0.6}
        out = merge(document("moe", parameters=parameters, dtype="float32"), random_seed=3)
    dense = [read_tensors(here / name) for name in NAMES]
    written = read_tensors(out)
    assert len(recorded) == 3 * 6 + 3
    for name, (state, _result) in recorded.items():
        torch.set_rng_state(state)
        group = TensorGroup.from_tensors([tensors[name] for tensors in dense], base_index=0)
        values = {"weight": 0.5, "density": 0.6}
        (expected,) = merge_methods.get(shared)((group,), parameters=values)
        assert torch.equal(written[name], expected), name


def test_experts_are_their_sources_bit_for_bit(here):
    got = read_tensors(merge(document()))
    for index, name in enumerate(NAMES):
        source = read_tensors(here / name)
        for layer in range(3):
            for dense, moe in EXPERT_PARTS.items():
                expert = got[f"model.layers.{layer}.block_sparse_moe.experts.{index}.{moe}.weight"]
                assert torch.equal(expert, source[f"model.layers.{layer}.mlp.{dense}.weight"])


def test_output_loads_without_this_package_and_computes_ff_moe(here):
    """Logits against MergeME's FF_MoE in 3.1.1, written out token by token on the stock dense
    model.
    """
    out = merge(document("moe_ties", parameters=PAPER, dtype="float32"), random_seed=5)
    script = (
        "import sys, torch\n"
        "for name in ('mergekit_moe_ext', '_mergekit_moe_ext_autoload', 'mergekit'): "
        "sys.modules[name] = None\n"
        "from transformers import AutoModelForCausalLM\n"
        "model, info = AutoModelForCausalLM.from_pretrained('out', output_loading_info=True)\n"
        "assert type(model).__module__.startswith('transformers.models.mixtral')\n"
        "assert not any(info.values()), info\n"
        "tokens = torch.arange(1, 41).reshape(2, 20) * 7 % 96\n"
        "torch.save(model.eval()(tokens).logits.detach(), 'logits.pt')\n"
    )
    loaded = run("python", "-c", script, env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}, cwd=here)
    assert loaded.returncode == 0, loaded.stderr

    tensors = read_tensors(out)
    dense = LlamaForCausalLM.from_pretrained(here / "base")
    dense.load_state_dict(
        without_ffn({k: v for k, v in tensors.items() if "moe" not in k}), strict=False
    )
    for index, layer in enumerate(dense.model.layers):
        prefix = f"model.layers.{index}.block_sparse_moe"

        def ff_moe(states, prefix=prefix):
            result = torch.zeros_like(states)
            for position in torch.cartesian_prod(
                *(torch.arange(n) for n in states.shape[:2])
            ).tolist():
                v = states[tuple(position)]
                scores = tensors[f"{prefix}.gate.weight"] @ v
                chosen = scores.topk(2)
                for weight, expert in zip(
                    chosen.values.softmax(0), chosen.indices.tolist(), strict=True
                ):
                    w1, w2, w3 = (
                        tensors[f"{prefix}.experts.{expert}.w{n}.weight"] for n in (1, 2, 3)
                    )
                    result[tuple(position)] += weight * (w2 @ (functional.silu(w1 @ v) * (w3 @ v)))
            return result

        layer.mlp.forward = ff_moe
    assert torch.allclose(logits(dense), torch.load("logits.pt"), atol=1e-5)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"head_dim": 12, "rms_norm_eps": 1e-3}),
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 5e4,
                    "factor": 4.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16,
                }
            },
        ),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
        ("llama", {"hidden_act": "gelu", "num_hidden_layers": 1, "num_key_value_heads": 4}),
        ("mistral", {"sliding_window": 5}),
        ("mistral", {"sliding_window": None, "tie_word_embeddings": True, "head_dim": 6}),
    ],
)
@pytest.mark.parametrize("gate_mode", ["random", "zeros"])
def test_equal_sources_give_the_dense_model(tmp_path, monkeypatch, family, config, gate_mode):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "base", 0, family=family, **config)
    out = merge(document("moe_ties", ["base"] * 3, parameters={"gate_mode": gate_mode}))
    assert json.loads((out / "config.json").read_text())["num_local_experts"] == 3
    dense, moe = (AutoModelForCausalLM.from_pretrained(path) for path in ("base", out))
    assert torch.allclose(logits(dense), logits(moe), atol=1e-5)
    assert (moe.lm_head.weight is moe.model.embed_tokens.weight) == config.get(
        "tie_word_embeddings", False
    )


def test_a_source_listed_twice_is_two_experts_and_merged_once(here):
    once = read_tensors(merge(document(models=["math", "code"], base=None), "once"))
    twice = read_tensors(merge(document(models=["math", "code", "math"], base=None), "twice"))
    assert torch.equal(once["model.norm.weight"], twice["model.norm.weight"])
    experts = [twice[f"model.layers.0.block_sparse_moe.experts.{i}.w1.weight"] for i in range(3)]
    assert torch.equal(experts[0], experts[2]) and not torch.equal(experts[0], experts[1])


def test_a_base_that_is_not_listed_is_no_expert_and_not_averaged(here):
    got = read_tensors(merge(document(models=["math", "code"])))
    math, code = read_tensors(here / "math"), read_tensors(here / "code")
    assert torch.allclose(
        got["model.norm.weight"], (math["model.norm.weight"] + code["model.norm.weight"]) / 2
    )
    assert got["model.layers.0.block_sparse_moe.gate.weight"].shape == (2, 32)


def test_tied_and_untied_fine_tunes_merge_into_an_untied_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "base", 0)
    make_model(tmp_path / "tied", 1, tie_word_embeddings=True)
    got = read_tensors(merge(document(models=["base", "tied"])))
    base, tied = read_tensors(tmp_path / "base"), read_tensors(tmp_path / "tied")
    expected = (base["lm_head.weight"] + tied["model.embed_tokens.weight"]) / 2
    assert torch.allclose(got["lm_head.weight"], expected)


def test_gates_depend_on_the_seed_and_the_mode(here):
    def gates(out, seed=None, mode="random"):
        parameters = {"gate_mode": mode}
        tensors = read_tensors(merge(document(parameters=parameters), out, random_seed=seed))
        return torch.stack(
            [tensors[f"model.layers.{i}.block_sparse_moe.gate.weight"] for i in range(3)]
        )

    first = gates("a", 1)
    assert torch.equal(first, gates("b", 1)) and not torch.equal(first, gates("c", 2))
    assert not torch.equal(first[0], first[1])
    assert first.std().item() == pytest.approx(0.02, rel=0.15)
    uniform = gates("d", 1, "uniform_random")
    assert uniform.std().item() == pytest.approx(0.02, rel=0.15)
    assert uniform.abs().max() <= 0.02 * 3**0.5
    assert not gates("e", 1, "zeros").any()


def test_gates_have_the_architecture_s_initializer_range(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "base", 0, initializer_range=0.3)
    for mode in ("random", "uniform_random"):
        got = read_tensors(
            merge(document(models=["base"] * 8, parameters={"gate_mode": mode}), mode)
        )
        assert got["model.layers.1.block_sparse_moe.gate.weight"].std().item() == pytest.approx(
            0.3, rel=0.15
        )


def test_without_a_seed_the_seed_is_the_one_on_the_card(here):
    config = document("moe_dare", parameters={"density": 0.5})
    merge(config, "other", random_seed=3)
    unseeded, seeded = merge(config, "unseeded"), merge(config, "seeded", random_seed=0)
    assert same_files(unseeded, seeded) and "Seed 0" in (unseeded / "README.md").read_text()


def edited_config(here, name, **changes):
    """./name: a copy of ./base with another config.json; None removes a key."""
    import shutil

    shutil.copytree(here / "base", here / name)
    config = {**json.loads((here / name / "config.json").read_text()), **changes}
    kept = {key: value for key, value in config.items() if value is not None}
    (here / name / "config.json").write_text(json.dumps(kept))


def test_remote_code_of_a_source_is_not_the_output_s(here):
    edited_config(here, "remote", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    out = merge(document(models=["remote", "math"], base=None))
    assert "auto_map" not in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("key", ["head_dim", "num_key_value_heads"])
def test_what_one_config_says_and_another_implies_is_the_same(tmp_path, monkeypatch, key):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "math")):
        make_model(tmp_path / name, seed, family="qwen2", num_key_value_heads=4)
    expected = read_tensors(merge(document(models=["base", "math"]), "expected"))
    config = json.loads(Path("math/config.json").read_text())
    assert config.get("head_dim") is None
    config |= {"head_dim": 8}
    if key == "num_key_value_heads":
        config |= {"num_key_value_heads": None}
    Path("math/config.json").write_text(json.dumps(config))
    got = read_tensors(merge(document(models=["base", "math"])))
    assert expected.keys() == got.keys() and all(
        torch.equal(expected[name], got[name]) for name in expected
    )
    Path("math/config.json").write_text(json.dumps(config | {"head_dim": 16}))
    with pytest.raises(click.ClickException, match="`head_dim` is 16, not 8"):
        merge(document(models=["base", "math"]), "other")


def test_a_donor_that_names_no_architecture(here):
    edited_config(here, "nameless", architectures=None)
    expected = read_tensors(merge(document(models=["base", "math"], base=None), "expected"))
    got = read_tensors(merge(document(models=["nameless", "math"], base=None)))
    assert expected.keys() == got.keys() and all(
        torch.equal(expected[name], got[name]) for name in expected
    )


def test_dtypes(here):
    out = merge(document(dtype="float32", out_dtype="bfloat16"))
    assert {tensor.dtype for tensor in read_tensors(out).values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16 and logits(model).isfinite().all()


def test_bfloat16_sources_without_dtype_stay_bfloat16(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(NAMES[:2]):
        make_model(tmp_path / name, seed, dtype=torch.bfloat16)
    out = merge(document(models=NAMES[:2]))
    assert {tensor.dtype for tensor in read_tensors(out).values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "options",
    [
        {"async_write": True, "write_threads": 3},
        {"num_threads": 3},
        {"clone_tensors": True},
        {"low_cpu_memory": True},
        {"allow_crimes": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_execution_options_change_no_byte(here, options):
    config = document("moe_dare", parameters={"density": 0.5})
    serial = merge(config, "serial", out_shard_size=20_000)
    other = merge(config, "other", out_shard_size=20_000, **options)
    assert len(list(serial.glob("model-*.safetensors"))) > 3
    assert same_files(serial, other)


def test_out_shard_size(here):
    shards = merge(document(), "sharded", out_shard_size=20_000)
    whole = merge(document(), "whole")
    first, second = (AutoModelForCausalLM.from_pretrained(path) for path in (shards, whole))
    assert torch.equal(logits(first), logits(second))


def test_generates_and_saves_again(here):
    model = AutoModelForCausalLM.from_pretrained(merge(document()))
    cached = model.generate(TOKENS, max_new_tokens=5, do_sample=False)
    plain = model.generate(TOKENS, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain)
    model.save_pretrained("again")
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained("again")))
    assert read_tensors(here / "again").keys() == read_tensors(here / "out").keys()


def test_pickled_sources(here):
    from shutil import copytree

    copytree(here / "math", here / "pickled")
    torch.save(read_tensors(here / "math"), here / "pickled" / "pytorch_model.bin")
    (here / "pickled" / "model.safetensors").unlink()
    expected = merge(document(models=["base", "math"]), "expected")
    for lazy in (False, True):
        got = merge(document(models=["base", "pickled"]), f"got-{lazy}", lazy_unpickle=lazy)
        assert all(torch.equal(t, read_tensors(got)[k]) for k, t in read_tensors(expected).items())


def test_tokenizer_files_come_from_the_donor(here):
    from tests.tokenizers import save_tokenizer

    (here / "math").unlink()
    make_model(here / "math", 1)
    save_tokenizer(here / "math", 96)
    (here / "math" / "preprocessor_config.json").write_text("{}")
    out = merge(document(models=["math", "code"], base=None))
    assert (
        AutoTokenizer.from_pretrained(out).get_vocab()
        == AutoTokenizer.from_pretrained("math").get_vocab()
    )
    assert (out / "preprocessor_config.json").exists()
    assert not (merge(document(base="./code"), "none") / "tokenizer.json").exists()
