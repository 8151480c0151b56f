"""Opening a model: what is damaged is one sentence, by every command, and nothing is written; what
is whole is opened.
"""

import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import mergekit_moe_ext.cli
import peft_routing.cli
from _mergekit_moe_ext_common.checkpoints import is_finite
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.loading import load_config, load_model, load_tokenizer
from _mergekit_moe_ext_common.options import Reading
from _mergekit_moe_ext_common.runs import Run
from tests.conftest import make_model, read_tensors
from tests.mergekit_moe_ext.ensembles import build
from tests.mergekit_moe_ext.mixtures.test_usage import FAMILIES, SWITCH, make_moe, words, write
from tests.peft_routing.adapters import save_experts
from tests.tokenizers import save_tokenizer

READING = Reading(quiet=True)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
Damage = Callable[[Path], None]
Tensors = dict[str, torch.Tensor]


def rewritten(change: Callable[[Tensors], Tensors]) -> Damage:
    """Changes the tensors of the one file of weights."""

    def damage(path: Path) -> None:
        file = next(path.glob("*.safetensors"))
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        save_file(change(tensors), file, {"format": "pt"})

    return damage


def without(*parts: str) -> Damage:
    return rewritten(
        lambda tensors: {
            name: tensor
            for name, tensor in tensors.items()
            if not any(part in name for part in parts)
        }
    )


def with_value(part: str, value: float) -> Damage:
    """Puts one value into the first tensor of such a name."""

    def change(tensors: Tensors) -> Tensors:
        name = min(name for name in tensors if part in name)
        tensors[name].view(-1)[0] = value
        return tensors

    return rewritten(change)


def cut_row(part: str) -> Damage:
    return rewritten(
        lambda tensors: {
            name: tensor[:-1].clone() if part in name else tensor
            for name, tensor in tensors.items()
        }
    )


def renamed(change: Callable[[str], str]) -> Damage:
    return rewritten(
        lambda tensors: {change(name): tensor for name, tensor in tensors.items()},
    )


def configured(file: str = "config.json", **values: Any) -> Damage:
    def damage(path: Path) -> None:
        content = json.loads((path / file).read_text())
        (path / file).write_text(json.dumps({**content, **values}))

    return damage


def edited(key: str, **values: Any) -> Damage:
    """Changes the first entry of a list in the configuration of an adapter."""

    def damage(path: Path) -> None:
        content = json.loads((path / "adapter_config.json").read_text())
        content[key][0] |= values
        (path / "adapter_config.json").write_text(json.dumps(content))

    return damage


def both(first: Damage, second: Damage) -> Damage:
    def damage(path: Path) -> None:
        first(path)
        second(path)

    return damage


def written(name: str, content: bytes) -> Damage:
    def damage(path: Path) -> None:
        (path / name).write_bytes(content)

    return damage


def halved(name: str) -> Damage:
    def damage(path: Path) -> None:
        content = (path / name).read_bytes()
        (path / name).write_bytes(content[: len(content) // 2])

    return damage


def in_shards(change: Damage) -> Damage:
    """Splits the file of weights, and then damages what there is."""

    def damage(path: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(path)
        (path / "model.safetensors").unlink()
        model.save_pretrained(path, max_shard_size="40KB")
        change(path)

    return damage


def indexed(name: Any) -> Damage:
    """Makes the index name another file for everything."""

    def damage(path: Path) -> None:
        index = path / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"] = dict.fromkeys(content["weight_map"], name)
        index.write_text(json.dumps(content))

    return damage


def as_pickle(path: Path) -> None:
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def as_pipe(path: Path) -> None:
    (path / "model-00001-of-00002.safetensors").unlink(missing_ok=True)
    os.mkfifo(path / "model-00001-of-00002.safetensors")


def to_nowhere(path: Path) -> None:
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to(path / "blobs" / "abc")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 538090408\n"
EVERYWHERE: dict[str, tuple[Damage, str]] = {
    "a tensor is missing": (without(Q_PROJ), f"model.safetensors lacks {Q_PROJ}"),
    "a tensor has NaN": (with_value("norm", math.nan), "norm.weight of "),
    "a download stopped": (halved("model.safetensors"), "model.safetensors is damaged"),
    "a layer too many": (configured(num_hidden_layers=9), "lacks model.layers."),
    "a word as a number": (configured(hidden_size="32"), "'hidden_size'"),
    "NaN in the config": (configured(attention_dropout=math.nan), "attention_dropout: nan"),
    "a pickle": (as_pickle, "pytorch_model.bin is a pickle"),
}
OF_MIXTURES: dict[str, tuple[Damage, str]] = {
    "an expert is missing": (without("0.block_sparse_moe.experts.3"), "experts.3.w1"),
    "half an expert is missing": (without("0.block_sparse_moe.experts.3.w1"), "experts.3.w1"),
    "all experts are missing": (without("experts."), "lacks model.layers.0.block_sparse_moe"),
    "a head is missing": (without("lm_head"), "lacks lm_head.weight"),
    "infinity": (with_value(Q_PROJ, math.inf), f"{Q_PROJ} of "),
    "beyond the dtype": (
        both(with_value(Q_PROJ, 1e9), configured(dtype="float16")),
        "does not fit into torch.float16",
    ),
    "another shape": (cut_row(Q_PROJ), "has the shape (31, 32)"),
    "another shape of an expert": (cut_row("experts.2.w1"), "experts.2.w1.weight of "),
    "a tensor too many": (
        rewritten(lambda tensors: {**tensors, "model.bias": torch.zeros(3)}),
        "holds model.bias, for which",
    ),
    "whole numbers": (
        rewritten(lambda tensors: {**tensors, Q_PROJ: tensors[Q_PROJ].view(torch.int32)}),
        "stored as torch.int32",
    ),
    "torch.compile": (renamed("_orig_mod.{}".format), "`_orig_mod.` in them, as torch.compile"),
    "DataParallel": (renamed("module.{}".format), "`module.` in them, as DataParallel"),
    "PEFT": (renamed("base_model.model.{}".format), "`base_model.model.` in them, as PEFT"),
    "another wrapper": (renamed("policy.actor.{}".format), "begin with `policy.actor.`"),
    "checkpointed layers": (
        renamed(lambda name: name.replace("layers.1.", "layers.1._checkpoint_wrapped_module.")),
        "`_checkpoint_wrapped_module.` in them",
    ),
    "a layer too few": (configured(num_hidden_layers=2), "holds model.layers.2."),
    "no layers that can be built": (configured(num_hidden_layers=10**9), "num_hidden_layers: 10"),
    "more experts per token than there are": (
        configured(num_experts_per_tok=9),
        "choose 9 of 4 experts",
    ),
    "no experts": (
        configured(num_local_experts=0, num_experts_per_tok=0),
        "cannot tell by its config",
    ),
    "a tokenizer without words": (
        configured("tokenizer.json", model={"type": "WordLevel", "vocab": {}, "unk_token": "x"}),
        "cannot read the tokenizer",
    ),
    "a dropout that is none": (configured(attention_dropout=2.0), "no probability"),
    "a negative epsilon": (configured(rms_norm_eps=-1.0), "must not be negative"),
    "a class that is a number": (configured(architectures=[3.5]), "the names of classes"),
    "a class in a list of lists": (configured(architectures=[["A"]]), "the names of classes"),
    "a class outside a list": (configured(architectures="A"), "the names of classes"),
    "foreign code in a list": (configured(auto_map=[]), "auto_map: []"),
    "a huge size": (configured(hidden_size=10**12), "Storage size calculation overflowed"),
    "a size of 0": (configured(num_attention_heads=0), "by the config of"),
    "an activation of no name": (configured(hidden_act="foo"), "KeyError: 'foo'"),
    "a rotary base of 0": (configured(rope_parameters={"rope_theta": 0.0}), "rope_theta: 0.0"),
    "a model of no type": (configured(model_type="foo"), "model type `foo`"),
    "weights elsewhere": (configured(transformers_weights="../x.safetensors"), "names its file"),
    "a config that is a list": (written("config.json", b"[1]"), "cannot read the config"),
    "an empty config": (written("config.json", b""), "config.json is empty"),
    "half a config": (halved("config.json"), "config.json is damaged"),
    "half a generation config": (written("generation_config.json", b"{"), "generation_config.json"),
    "half a tokenizer": (halved("tokenizer.json"), "tokenizer.json is damaged"),
    "a tokenizer of another kind": (written("tokenizer.json", b"[]"), "cannot read the tokenizer"),
    "no tokenizer": (
        lambda path: (path / "tokenizer.json").unlink(),
        "has no tokenizer, which is one of tokenizer.json, ",
    ),
    "a tokenizer that is a pointer": (written("tokenizer.json", LFS), "Git LFS pointer"),
    "a pointer": (written("model.safetensors", LFS), "Git LFS pointer"),
    "an empty file": (written("model.safetensors", b""), "model.safetensors is empty"),
    "noise": (written("model.safetensors", bytes(range(256))), "model.safetensors is damaged"),
    "a disguised pickle": (
        lambda path: torch.save({}, path / "model.safetensors"),
        "is a pickle under the name",
    ),
    "a link to nothing": (to_nowhere, "which does not exist"),
    "no index": (
        in_shards(lambda path: (path / "model.safetensors.index.json").unlink()),
        "no model.safetensors.index.json",
    ),
    "half an index": (in_shards(halved("model.safetensors.index.json")), "index.json is damaged"),
    "an index of another kind": (
        in_shards(written("model.safetensors.index.json", b'{"weight_map": 3}')),
        "an index has a `weight_map`",
    ),
    "an index of numbers": (in_shards(indexed(3)), "names 3 as a file"),
    "a shard outside": (in_shards(indexed("../secret.safetensors")), "only files in its own"),
    "a shard elsewhere": (in_shards(indexed("/etc/passwd")), "only files in its own"),
    "a shard is missing": (in_shards(indexed("x.safetensors")), "x.safetensors is missing"),
    "a pipe": (in_shards(as_pipe), "is a pipe or a device"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture, an ensemble, a base and a routed adapter on it, and texts."""
    root = tmp_path_factory.mktemp("whole")
    make_moe(root / "moe", "mixtral", **FAMILIES["mixtral"])
    make_model(root / "base", 0)
    save_tokenizer(root / "base", 96)
    build("llama", router_layers=0).save_pretrained(root / "ensemble")
    save_tokenizer(root / "ensemble", 64)
    experts = save_experts(root, ("math", "code"))
    peft_routing.compose(str(root / "base"), experts, str(root / "routed"), router="linear")
    write(root / "texts.jsonl", words(1, 6))
    return root


@pytest.fixture
def here(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with copies of all that."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


TRAINING = "--max-steps 1 --held-out 2 --max-length 16 --quiet"
COMMANDS = {
    "usage": ("moe", "usage moe --data a=texts.jsonl --quiet"),
    "train": ("moe", f"train moe --train gates --data a=texts.jsonl -o out {TRAINING}"),
    "unload": ("ensemble", "unload ensemble -o out"),
    "adapt": ("ensemble", "adapt ensemble --data sun=texts.jsonl -o out --steps 1 --quiet"),
    "inspect": ("base", "inspect routed --base base --data a=texts.jsonl --quiet"),
    "train a router": (
        "base",
        f"train routed --base base --data a=texts.jsonl -o out --learning-rate 0.01 {TRAINING}",
    ),
}


def invoke(name: str, command: str) -> Result:
    is_routed = name in ("inspect", "train a router", "export", "compose")
    main = peft_routing.cli.main if is_routed else mergekit_moe_ext.cli.main
    return CliRunner().invoke(main, command.split())


def check_refused(result: Result, expected: str, before: set[Path]) -> None:
    """One sentence, and nothing written."""
    assert isinstance(result.exception, SystemExit), result.exception
    messages = [line for line in result.output.splitlines() if line.startswith("Error: ")]
    assert result.exit_code == 1 and len(messages) == 1, result.output
    assert expected in messages[0] and len(messages[0]) < 600, messages[0]
    assert "Traceback" not in result.output
    assert set(Path().rglob("*")) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_whole_model_is_opened(here: Path, command: str) -> None:
    result = invoke(command, COMMANDS[command][1])
    assert result.exit_code == 0, result.output


def test_an_ensemble_of_an_older_version_is_opened(here: Path) -> None:
    content = json.loads((here / "ensemble" / "config.json").read_text())
    content["ensembling"]["init_std"] = content["ensembling"].pop("router_init_std", 0.01)
    (here / "ensemble" / "config.json").write_text(json.dumps(content))
    result = invoke("unload", COMMANDS["unload"][1])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(("key", "value"), [("routing_tokens", "abc"), ("init_lambda", [1])])
def test_an_ensemble_of_another_type_is_refused(here: Path, key: str, value: Any) -> None:
    content = json.loads((here / "ensemble" / "config.json").read_text())
    content["ensembling"][key] = value
    (here / "ensemble" / "config.json").write_text(json.dumps(content))
    result = invoke("unload", COMMANDS["unload"][1])
    check_refused(result, f"`{key}` under `ensembling`", set(Path().rglob("*")))


def test_an_ensemble_across_layers_is_refused(here: Path) -> None:
    content = json.loads((here / "ensemble" / "config.json").read_text())
    groups = content["ensembling"]["groups"]
    first, second = groups.values()
    first[0], second[0] = second[0], first[0]
    (here / "ensemble" / "config.json").write_text(json.dumps(content))
    result = invoke("unload", COMMANDS["unload"][1])
    check_refused(result, "which is in another layer", set(Path().rglob("*")))


def test_an_adapter_whose_base_is_no_name_is_refused(here: Path) -> None:
    path = here / "routed" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": [1]}))
    result = invoke("inspect", "inspect routed --data a=texts.jsonl --quiet")
    check_refused(result, "which is no name: give --base", set(Path().rglob("*")))


@pytest.mark.parametrize("damage", EVERYWHERE)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_damaged_model(here: Path, command: str, damage: str) -> None:
    change, expected = EVERYWHERE[damage]
    model, line = COMMANDS[command]
    change(here / model)
    check_refused(invoke(command, line), expected, set(Path().rglob("*")))


@pytest.mark.parametrize("damage", OF_MIXTURES)
def test_what_is_damaged_is_named(here: Path, damage: str) -> None:
    change, expected = OF_MIXTURES[damage]
    change(here / "moe")
    check_refused(invoke("usage", COMMANDS["usage"][1]), expected, set(Path().rglob("*")))


OF_ADAPTERS: dict[str, tuple[Damage, str]] = {
    "a router is missing": (without("layers.1.mlp.down_proj.routed_lora_router"), "lacks "),
    "an expert is missing": (without("layers.1.mlp.down_proj.routed_lora_experts.A"), "lacks "),
    "all experts are missing": (without("routed_lora_experts"), "more: fetch it again"),
    "everything is missing": (rewritten(lambda tensors: {}), "more: fetch it again"),
    "a tensor too many": (
        rewritten(lambda tensors: {**tensors, "base_model.model.x.weight": torch.zeros(2)}),
        "holds base_model.model.x.weight",
    ),
    "another shape": (cut_row("layers.1.mlp.down_proj.routed_lora_experts.A"), "size mismatch"),
    "NaN": (with_value("routed_lora_experts.A", math.nan), "NaN or infinity"),
    "a wrapper's names": (renamed("module.{}".format), "lacks "),
    "a download stopped": (halved("adapter_model.safetensors"), "is damaged"),
    "a pointer": (written("adapter_model.safetensors", LFS), "Git LFS pointer"),
    "half a config": (halved("adapter_config.json"), "adapter_config.json is damaged"),
    "a config of another kind": (written("adapter_config.json", b"[]"), "cannot read routed"),
    "a layout of another kind": (configured("adapter_config.json", layout=7), "list of mappings"),
    "a layout without scalings": (edited("layout", scalings={}), "each part of `layout`"),
    "a rank that is none": (edited("layout", ranks=[2.5, 2]), "each part of `layout`"),
    "an expert's name that is none": (edited("experts", name=True), "the name True"),
    "an expert's dtype that is none": (edited("experts", dtype=-1), "the dtype -1"),
}


@pytest.mark.parametrize("damage", OF_ADAPTERS)
@pytest.mark.parametrize("command", ["inspect", "train a router", "export"])
def test_a_damaged_routed_adapter_is_refused(here: Path, command: str, damage: str) -> None:
    change, expected = OF_ADAPTERS[damage]
    change(here / "routed")
    line = COMMANDS[command][1] if command in COMMANDS else "export routed --base base -o out"
    check_refused(invoke(command, line), expected, set(Path().rglob("*")))


@pytest.mark.parametrize("router", ["uniform", "linear", "arrow"])
@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (with_value("lora_A", math.nan), "lora_A.weight of expert 'math' (math)"),
        (written("adapter_model.safetensors", LFS), "Git LFS pointer"),
        (written("adapter_config.json", b"[]"), "expert 'math' (math)"),
        (configured("adapter_config.json", lora_alpha="x"), "expert 'math' (math)"),
    ],
    ids=["NaN", "a pointer", "a config of another kind", "a word as a number"],
)
def test_a_damaged_expert_is_not_composed(
    here: Path, router: str, damage: Damage, expected: str
) -> None:
    damage(here / "math")
    line = f"compose base --expert math=math --expert code=code --router {router} -o out"
    check_refused(invoke("compose", line), expected, set(Path().rglob("*")))


def test_a_training_that_diverges_writes_nothing(here: Path) -> None:
    before = set(Path().rglob("*"))
    line = f"train moe --train all --data a=texts.jsonl -o out --learning-rate 1e30 {TRAINING}"
    check_refused(invoke("train", line.replace("-steps 1", "-steps 3")), "diverged", before)
    without_rows = line.replace("--held-out 2", "--held-out 0").replace("-steps 1", "-steps 3")
    check_refused(invoke("train", without_rows), "diverged", before)


def test_a_router_that_diverges_without_held_out_rows_is_not_written(here: Path) -> None:
    before = set(Path().rglob("*"))
    line = COMMANDS["train a router"][1].replace("--learning-rate 0.01", "--learning-rate 1e38")
    line = line.replace("--held-out 2", "--held-out 0").replace("-steps 1", "-steps 3")
    check_refused(invoke("train a router", line), "diverged", before)


@pytest.mark.parametrize("device", ["cuda:99", "foo", "meta"])
def test_a_device_that_is_not_there_is_refused(here: Path, device: str) -> None:
    line = f"{COMMANDS['usage'][1]} --device {device}"
    check_refused(invoke("usage", line), f"device {device!r}", set(Path().rglob("*")))


def test_a_decoder_that_does_not_say_how_it_starts_is_refused(here: Path) -> None:
    make_moe(here / "switch", "switch_transformers", **SWITCH)
    configured(decoder_start_token_id=None)(here / "switch")
    write(here / "pairs.jsonl", words(2, 4, ("input", "target")))
    result = invoke("usage", "usage switch --data a=pairs.jsonl --quiet")
    assert result.exit_code == 1 and "set `decoder_start_token_id`" in result.output


def test_a_model_without_a_tokenizer_is_refused(here: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (here / "moe" / name).unlink()
    check_refused(invoke("usage", COMMANDS["usage"][1]), "tokenizer", set(Path().rglob("*")))


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "unload"])
def test_the_tokenizer_of_another_model(here: Path, command: str) -> None:
    """Tokens that the model does not know are refused, unless they are padding alone."""
    model, line = COMMANDS[command]
    size = json.loads((here / model / "config.json").read_text())["vocab_size"]
    save_tokenizer(here / model, size + 1, ("<pad>",), pad_token="<pad>")
    result = invoke(command, line)
    assert result.exit_code == 0, result.output
    shutil.rmtree(here / "out", ignore_errors=True)
    save_tokenizer(here / model, size + 8, ("far",))
    write(here / "texts.jsonl", [{"text": f"w1 w2 {'w3 far ' * 8}"}] * 6)
    expected = f"the token {size + 7} of it, and the model knows {size} tokens"
    check_refused(invoke(command, line), expected, set(Path().rglob("*")))


def open_(path: Path) -> Any:
    return load_model(str(path), load_config(str(path), READING), READING, dtype="auto")


WHOLE: dict[str, Damage] = {
    "in shards": in_shards(lambda path: None),
    "old buffers": rewritten(
        lambda tensors: {
            **tensors,
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
        }
    ),
    "a trunk's names": renamed(lambda name: name.removeprefix("model.")),
    "stacked experts": lambda path: AutoModelForCausalLM.from_pretrained(path).save_pretrained(
        path, save_original_format=False
    ),
    "half precision": lambda path: AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16
    ).save_pretrained(path),
    "a dtype that is not said": configured(dtype=None),
}


@pytest.mark.parametrize("form", WHOLE)
def test_a_model_in_another_form_is_whole(here: Path, form: str) -> None:
    WHOLE[form](here / "moe")
    stock = AutoModelForCausalLM.from_pretrained(here / "moe", dtype="auto").state_dict()
    opened = open_(here / "moe").state_dict()
    assert stock.keys() == opened.keys()
    assert all(torch.equal(stock[name], opened[name]) for name in stock)


@pytest.mark.parametrize("is_stored_twice", [False, True])
def test_a_tied_head_may_be_stored_or_not(here: Path, is_stored_twice: bool) -> None:
    make_model(here / "tied", 0, tie_word_embeddings=True)
    if is_stored_twice:
        embedding = read_tensors(here / "tied")["model.embed_tokens.weight"]
        rewritten(lambda tensors: {**tensors, "lm_head.weight": embedding})(here / "tied")
    opened = open_(here / "tied")
    assert torch.equal(opened.lm_head.weight, opened.model.embed_tokens.weight)


def test_a_tokenizer_without_files_of_its_own_is_opened(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), READING)("ab").input_ids == [100, 101, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_what_is_finite(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    for value in (0.0, -1.0, math.nan, math.inf, -math.inf):
        tensor = torch.randn(3, 5, generator=draw).to(dtype)
        tensor[1, 2] = value
        assert is_finite(tensor) == bool(np.isfinite(tensor.double().numpy()).all())
    assert is_finite(torch.full((3,), torch.finfo(dtype).max, dtype=dtype))
    assert is_finite(torch.zeros(0, 4, dtype=dtype)) and is_finite(torch.tensor([1, 2]))


class Running:
    """Unpickling it writes a file."""

    def __reduce__(self) -> Any:
        return Path.write_text, (Path("ran"), "")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_checkpoint_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "out.checkpoints" / "checkpoint-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text("{}")
    (checkpoint.parent / "settings.json").write_text('{"processes": 1, "fsdp": false}')
    run = Run("out", READING)
    with pytest.raises(UserError, match="no safetensors file of what was trained"):
        run.begin({}, resume=True)
    save_file({"a": torch.zeros(2)}, checkpoint / "trained.safetensors")
    torch.save({"state": {0: torch.zeros(2)}, "seed": (1, [2.0])}, checkpoint / name)
    run.begin({}, resume=True)
    assert run.starts == {"": str(checkpoint)}
    (checkpoint / name).write_bytes(pickle.dumps(Running()))
    with pytest.raises(UserError, match=f"{name} is damaged, or holds more than tensors"):
        run.begin({}, resume=True)
    torch.save(Running(), checkpoint / name)
    with pytest.raises(UserError, match=f"{name} is damaged, or holds more than tensors"):
        run.begin({}, resume=True)
    assert not Path("ran").exists()
    (checkpoint.parent / "settings.json").write_text("{")
    with pytest.raises(UserError, match=r"settings\.json is damaged"):
        run.begin({}, resume=True)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("nowhere", ""), ("out-trained/", ""), ("two/parts/more", ""), ("owner/name", " (")],
)
def test_what_is_neither_here_nor_on_the_hub_is_said_to_be_absent(
    name: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as raised:
        load_config(name, READING)
    start = (
        f"there is no directory {name}, and no model of that name on the Hub that can be reached"
    )
    assert raised.value.message.startswith(f"{start}{reason}")
    assert reason or raised.value.message.endswith("reached")
