"""LoRA directories as people have them, each against PEFT's own logits of it; and the table of
`docs/adapters.md`, whose every row is a case here.
"""

import copy
import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from peft_routing import RoutedLoraConfig, UserError, compose
from peft_routing.cli import main
from peft_routing.expert import _CANNOT_BE_ROUTED
from tests.conftest import TINY
from tests.peft_routing.adapters import TARGETS, make_base, save_lora

IDS = torch.randint(3, 90, (2, 10), generator=torch.Generator().manual_seed(7))
PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`",
    "ignore:Model (has|with) `tie_word_embeddings=True`",
    "ignore:`lora_bias=True` was passed",
    "ignore:Adapter .* have invalid shape",
    "ignore:Already found a `peft_config`",  # a bias has one dimension
)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def routed(base: Any, experts: Mapping[str, Any], **config: Any) -> Any:
    """A routed adapter on a copy of the base, which is left as it is."""
    config = {"router": "uniform", **config}
    paths = {name: str(path) for name, path in experts.items()}
    return get_peft_model(copy.deepcopy(base), RoutedLoraConfig(experts=paths, **config)).eval()


def stock(base: Any, path: Path) -> Any:
    """PEFT's own model of the adapter."""
    return PeftModel.from_pretrained(copy.deepcopy(base), path).eval()


def edit(path: Path, **values: Any) -> None:
    config = json.loads((path / CONFIG).read_text())
    (path / CONFIG).write_text(json.dumps({**config, **values}))


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Other weights in an adapter's file."""
    changed = {key: value.clone() for key, value in change(load_file(path / WEIGHTS)).items()}
    save_file(changed, path / WEIGHTS, {"format": "pt"})


def rename(path: Path, change: Callable[[str], str]) -> None:
    """Other keys in an adapter's file."""
    rewrite(path, lambda tensors: {change(key): value for key, value in tensors.items()})


def grown() -> Any:
    """The base model with four more tokens."""
    model = make_base()
    model.resize_token_embeddings(100, mean_resizing=False)
    return model


def save_with_embeddings(path: Path, base: Any) -> Path:
    """A LoRA whose file holds the embedding and the head of its base."""
    model = PeftModel.from_pretrained(base, save_lora(path, 5, base=copy.deepcopy(base)))
    model.save_pretrained(path, save_embedding_layers=True)
    return path


def vision_model(kind: str) -> Any:
    """A tiny model of images and texts, whose decoder transformers has moved."""
    torch.manual_seed(0)
    tower = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 8,
        "patch_size": 4,
    }
    text = dict(TINY)
    if kind == "llava":
        config = LlavaConfig(
            text_config=LlamaConfig(**text),
            vision_config=CLIPVisionConfig(**tower),
            image_token_index=95,
        )
        return LlavaForConditionalGeneration(config).eval()
    if kind == "gemma3":
        vision = {**tower, "model_type": "siglip_vision_model"}
        text = {**text, "head_dim": 8, "sliding_window": 16}
        config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
        return Gemma3ForConditionalGeneration(config).eval()
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": text["hidden_size"], "num_heads": 4}
    ids = {"image_token_id": 95, "video_token_id": 94, "vision_start_token_id": 93}
    text = {**text, "rope_parameters": rope}
    config = Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    return Qwen2VLForConditionalGeneration(config).eval()


OLD_NAMES = {
    "llava": ("model.model.language_model.", "model.language_model.model."),
    "gemma3": ("model.model.language_model.", "model.language_model.model."),
    "qwen2_vl": ("model.model.language_model.", "model.model."),
}


# What is accepted: the base, and the directory


def named_keys(path: Path, adapter: str = "default") -> tuple[Any, Path]:
    save_lora(path, 5)
    rename(path, lambda key: key.replace(".weight", f".{adapter}.weight"))
    return make_base(), path


def a_pickle(path: Path) -> tuple[Any, Path]:
    save_lora(path, 5)
    torch.save(load_file(path / WEIGHTS), path / "adapter_model.bin")
    (path / WEIGHTS).unlink()
    return make_base(), path


def old_names(path: Path, kind: str = "llava", targets: str = "q_proj|v_proj|down_proj") -> Any:
    base = vision_model(kind)
    target_modules = rf".*language_model.*\.({targets})|lm_head"
    save_lora(path, 5, base=copy.deepcopy(base), target_modules=target_modules)
    shutil.copytree(path, path.with_name("new"))
    new, old = OLD_NAMES[kind]
    rename(path, lambda key: key.replace(new, old))
    return base, path


def copies_of_the_base(path: Path) -> tuple[Any, Path]:
    return make_base(), save_with_embeddings(path, make_base())


def copy_of_the_head(path: Path) -> tuple[Any, Path]:
    base = make_base()
    return base, save_lora(path, 5, base=copy.deepcopy(base), target_modules=["lm_head", "q_proj"])


def with_biases(path: Path) -> tuple[Any, Path]:
    base = make_base(attention_bias=True)
    return base, save_lora(path, 5, base=copy.deepcopy(base), lora_bias=True)


def of_another_peft(path: Path) -> tuple[Any, Path]:
    save_lora(path, 5)
    edit(path, use_tomorrow=True, enable_lora=None, merge_weights=False)
    return make_base(), path


def without_prefix(path: Path) -> tuple[Any, Path]:
    save_lora(path, 5)
    rename(path, lambda key: key.removeprefix("base_model.model."))
    return make_base(), path


def at_more_modules(path: Path) -> tuple[Any, Path]:
    save_lora(path, 5)
    edit(path, target_modules=["q_proj"])
    return make_base(), path


ACCEPTED: dict[str, Callable[[Path], tuple[Any, Path]]] = {
    "keys that name the adapter (`lora_A.default.weight`)": named_keys,
    "`adapter_model.bin`": a_pickle,
    "names of modules from before transformers moved them": old_names,
    "the base model's own embedding or head beside the LoRA": copies_of_the_base,
    "a LoRA of the head, with PEFT's copy of the head": copy_of_the_head,
    "`lora_bias`": with_biases,
    "fields of other PEFT versions": of_another_peft,
    "keys without `base_model.model.`": without_prefix,
    "factors at modules that `adapter_config.json` does not target": at_more_modules,
}


# What is refused


def of_type(config: Any) -> Callable[[Path], tuple[Any, Path]]:
    def make(path: Path) -> tuple[Any, Path]:
        get_peft_model(make_base(), config).save_pretrained(path)
        return make_base(), path

    return make


def a_routed_one(path: Path) -> tuple[Any, Path]:
    routed(make_base(), {"one": save_lora(path / "one", 5)}).save_pretrained(path / "routed")
    return make_base(), path / "routed"


def saying(**values: Any) -> Callable[[Path], tuple[Any, Path]]:
    """An adapter whose configuration says something else."""

    def make(path: Path) -> tuple[Any, Path]:
        save_lora(path, 5)
        edit(path, **values)
        return make_base(), path

    return make


def holding(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Any:
    """An adapter whose file holds something else."""

    def make(path: Path) -> tuple[Any, Path]:
        save_lora(path, 5)
        rewrite(path, change)
        return make_base(), path

    return make


def on_the_embedding(path: Path) -> tuple[Any, Path]:
    targets = ["q_proj", "embed_tokens"]
    return make_base(), save_lora(path, 5, base=make_base(), target_modules=targets)


def on_a_larger_vocabulary(path: Path) -> tuple[Any, Path]:
    return make_base(), save_with_embeddings(path, grown())


def on_a_larger_head(path: Path) -> tuple[Any, Path]:
    save_lora(path, 5, base=grown(), target_modules=["lm_head", "q_proj"])
    rewrite(path, lambda tensors: {k: v for k, v in tensors.items() if ".base_layer." not in k})
    return make_base(), path


def with_another_embedding(path: Path) -> tuple[Any, Path]:
    _, path = copies_of_the_base(path)
    rewrite(path, lambda tensors: {k: v if "lora_" in k else v + 1 for k, v in tensors.items()})
    return make_base(), path


def on_fused_experts(path: Path) -> tuple[Any, Path]:
    """As transformers 4 named a Mixtral's experts, each of which was a module."""
    sizes = {"num_local_experts": 2, "num_experts_per_tok": 1, "num_hidden_layers": 1}
    base = make_base("mixtral", **sizes)
    save_lora(path, 5, base=copy.deepcopy(base), target_modules=["q_proj"])
    tensors = {}
    for expert in range(2):
        for name, (inner, outer) in {"w1": (32, 48), "w2": (48, 32), "w3": (32, 48)}.items():
            key = f"base_model.model.model.layers.0.block_sparse_moe.experts.{expert}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.ones(4, inner)
            tensors[f"{key}.lora_B.weight"] = torch.ones(outer, 4)
    rewrite(path, lambda _: tensors)
    return base, path


def two_adapters(path: Path) -> tuple[Any, Path]:
    _, path = named_keys(path, "math")
    rewrite(path, lambda old: {**old, **{k.replace("math", "code"): v for k, v in old.items()}})
    return make_base(), path


class Attending(nn.Module):
    """A module in which torch's own attention stands."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def on_attention(target: str) -> Callable[[Path], tuple[Any, Path]]:
    def make(path: Path) -> tuple[Any, Path]:
        get_peft_model(Attending(), LoraConfig(target_modules=[target])).save_pretrained(path)
        return Attending(), path

    return make


class Runs:
    """An object whose unpickling runs code."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran"),)


def with_code(path: Path) -> tuple[Any, Path]:
    _, path = a_pickle(path)
    torch.save({"weight": Runs()}, path / "adapter_model.bin")
    return make_base(), path


def without_weights(path: Path) -> tuple[Any, Path]:
    save_lora(path, 5)
    (path / WEIGHTS).unlink()
    return make_base(), path


def for_another_size(path: Path) -> tuple[Any, Path]:
    return make_base(), save_lora(path, 5, base=make_base(hidden_size=64))


def for_more_layers(path: Path) -> tuple[Any, Path]:
    return make_base(), save_lora(path, 5, base=make_base(num_hidden_layers=4))


def emptied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.new_zeros(0) for key, value in tensors.items()}


def as_convolution(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value[..., None, None] for key, value in tensors.items()}


def diverged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value * float("inf") for key, value in tensors.items()}


def with_an_extra(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, "base_model.model.model.layers.0.mlp.scale": torch.ones(1)}


REFUSED: dict[str, Callable[[Path], tuple[Any, Path]]] = {
    "LoHa, LoKr, VeRA and other types whose update is a matrix": of_type(
        peft.LoHaConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    ),
    "IA³, OFT, AdaLoRA, prompts and other types": of_type(
        peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    ),
    "a routed adapter": a_routed_one,
    "DoRA": saying(use_dora=True),
    "aLoRA": saying(alora_invocation_tokens=[1]),
    "Arrow": saying(arrow_config={"top_k": 1}),
    "BD-LoRA": saying(use_bdlora={"nblocks": 2}),
    "KaSA": saying(kasa_config={"beta": 1}),
    "LoRA-GA": saying(lora_ga_config={"direction": "ArB2r"}),
    "MonteCLoRA": saying(monteclora_config={"n": 2}),
    "QA-LoRA": saying(use_qalora=True),
    "PiSSA, OLoRA, CorDA, LoftQ": saying(init_lora_weights="pissa"),
    "`bias`": saying(bias="all"),
    "`layer_replication`": saying(layer_replication=[[0, 2]]),
    "`target_parameters`": saying(target_parameters=["experts.down_proj"]),
    "`trainable_token_indices`": saying(trainable_token_indices=[3]),
    "a LoRA of the embedding": on_the_embedding,
    "a LoRA of a convolution": holding(as_convolution),
    "a LoRA of the experts of a mixture (transformers 4's Mixtral, Qwen2-MoE)": on_fused_experts,
    "a LoRA of `MultiheadAttention`": on_attention("attention"),
    "a larger vocabulary": on_a_larger_vocabulary,
    "the same, without the embedding in the file": on_a_larger_head,
    "an embedding or a head that is not the base model's": with_another_embedding,
    "tensors that ZeRO-3 or FSDP left in parts": holding(emptied),
    "several adapters in one file": two_adapters,
    "tensors of another kind": holding(with_an_extra),
    "NaN or infinity": holding(diverged),
    "`adapter_model.bin` with code": with_code,
    "no weights": without_weights,
    "another base model: modules": for_more_layers,
    "another base model: sizes": for_another_size,
    "a rank that the configuration does not say": saying(r=8),
}


def rows(heading: str) -> dict[str, str]:
    """The two columns of the table under a heading."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    table = {}
    for line in section.splitlines():
        if line.startswith("|"):
            first, second = line.strip("|").split("|")
            table[first.strip()] = second.strip()
    return dict(list(table.items())[2:])


def test_the_page_lists_what_is_tried_here() -> None:
    assert list(rows("Accepted")) == list(ACCEPTED)
    assert list(rows("Refused")) == list(REFUSED)
    for key in _CANNOT_BE_ROUTED.keys() - {"modules_to_save"}:
        assert any(f"{key} is …" in words for words in rows("Refused").values()), key


def test_an_initialisation_is_refused_however_it_is_spelt(tmp_path: Path) -> None:
    """PEFT takes OLoRA in any case, and changes the base model's weights when it is loaded."""
    base, path = saying(init_lora_weights="OLoRA")(tmp_path / "odd")
    with pytest.raises(UserError, match="init_lora_weights is 'OLoRA', which changes the base"):
        routed(base, {"odd": path})


@pytest.mark.parametrize("case", ACCEPTED)
@pytest.mark.filterwarnings("ignore:.*use_tomorrow", "ignore:.*left out, as PEFT")
def test_what_is_accepted_has_pefts_own_logits(case: str, tmp_path: Path) -> None:
    base, path = ACCEPTED[case](tmp_path / "odd")
    plain = tmp_path / "plain"
    save_lora(plain, 6, base=copy.deepcopy(base), target_modules=r".*\.(q_proj|up_proj)")
    if case == "keys without `base_model.model.`":  # which PEFT itself takes from no file
        expected = logits(stock(base, save_lora(tmp_path / "prefixed", 5)))
    else:
        expected = logits(stock(base, path))
    assert (expected - logits(base)).abs().max() > 1e-2
    experts = {"odd": path, "plain": plain}

    model = routed(base, experts, router="fixed", weights=[1.0, 0.0])
    torch.testing.assert_close(logits(model), expected, atol=2e-6, rtol=1e-5)
    model.save_pretrained(tmp_path / "routed")
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "routed").eval()
    assert torch.equal(logits(again), logits(model))
    model.export_experts(str(tmp_path / "experts"))
    for name, made in (("odd", expected), ("plain", logits(stock(base, plain)))):
        exported = logits(stock(base, tmp_path / "experts" / name))
        torch.testing.assert_close(exported, made, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_refused_in_the_words_of_the_page(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base, path = REFUSED[case](tmp_path / "odd")
    words = re.fullmatch(r"`(.+)`", rows("Refused")[case])
    assert words is not None
    pattern = re.escape(words[1]).replace("…", ".+")
    with pytest.raises((UserError, FileNotFoundError), match=f"expert 'odd'.*{pattern}$"):
        routed(base, {"odd": path})
    assert not Path("ran").exists()


# Accepted layouts in more detail


@pytest.mark.parametrize("adapter", ["default", "math-2", "weight", "0"])
def test_any_name_of_an_adapter_may_be_in_the_keys(adapter: str, tmp_path: Path) -> None:
    base, path = named_keys(tmp_path / "named", adapter)
    expected = logits(stock(base, save_lora(tmp_path / "usual", 5)))
    torch.testing.assert_close(logits(routed(base, {"one": path})), expected, atol=2e-6, rtol=0)


def test_the_state_dict_of_a_whole_model(tmp_path: Path) -> None:
    base = make_base()
    save_lora(tmp_path / "math", 5)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "math", adapter_name="math")
    rewrite(tmp_path / "math", lambda _: model.state_dict())
    assert torch.equal(logits(routed(base, {"one": tmp_path / "math"})), logits(model.eval()))


@pytest.mark.parametrize("kind", OLD_NAMES)
def test_old_names_of_the_modules_of_vision_models(kind: str, tmp_path: Path) -> None:
    base, path = old_names(tmp_path / "old", kind)
    # Of the old names of Qwen2-VL, PEFT itself finds none.
    expected = logits(stock(base, tmp_path / "new"))
    assert (expected - logits(base)).abs().max() > 1e-2
    torch.testing.assert_close(logits(routed(base, {"one": path})), expected, atol=2e-6, rtol=1e-5)


def test_names_that_a_model_maps_itself(tmp_path: Path) -> None:
    base, path = make_base(), save_lora(tmp_path / "old", 5)
    expected = logits(stock(base, path))
    rename(path, lambda key: key.replace(".layers.", ".blocks."))
    with pytest.raises(UserError, match=r"blocks.* is not in the base model"):
        routed(base, {"one": path})
    base._checkpoint_conversion_mapping = {r"\.blocks\.": ".layers."}
    torch.testing.assert_close(logits(stock(base, path)), expected, atol=0, rtol=0)
    torch.testing.assert_close(logits(routed(base, {"one": path})), expected, atol=2e-6, rtol=0)


WITH_HEAD = ["q_proj", "v_proj", "lm_head"]
# The modules in the file, what the configuration says of them, and how many it does not target.
PLACES: dict[str, tuple[list[str], dict[str, Any], str]] = {
    "fewer": (TARGETS, {"target_modules": ["q_proj"]}, "6 of its 9"),
    "a pattern": (TARGETS, {"target_modules": r"model\.layers\.0\..*_proj"}, "6 of its 9"),
    "one layer": (TARGETS, {"layers_to_transform": [1]}, "6 of its 9"),
    "the first layer": (TARGETS, {"layers_to_transform": 0}, "6 of its 9"),
    "a layer by a pattern": (
        TARGETS,
        {"layers_to_transform": [1], "layers_pattern": "layers"},
        "6 of its 9",
    ),
    "excluded": (TARGETS, {"exclude_modules": ["down_proj"]}, "3 of its 9"),
    "excluded by a pattern": (TARGETS, {"exclude_modules": r".*\.1\..*"}, "3 of its 9"),
    "all but the head": (WITH_HEAD, {"exclude_modules": ["lm_head"]}, "1 of its 7"),
    "the head alone": (WITH_HEAD, {"target_modules": "lm_head"}, "6 of its 7"),
    "those of the family": (TARGETS, {"target_modules": None}, "3 of its 9"),
    "all but the output": (WITH_HEAD, {"target_modules": "all-linear"}, "1 of its 7"),
    "all but one": (
        TARGETS,
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        "3 of its 9",
    ),
}


@pytest.mark.parametrize("case", PLACES)
@pytest.mark.parametrize("is_named", [False, True])
def test_factors_that_peft_leaves_out_are_left_out(
    case: str, is_named: bool, tmp_path: Path
) -> None:
    targets, stated, number = PLACES[case]
    base, path = make_base(), tmp_path / "odd"
    save_lora(path, 5, target_modules=targets)
    edit(path, **stated)
    expected = logits(stock(base, path))
    assert (expected - logits(base)).abs().max() > 1e-2
    if is_named:
        rename(path, lambda key: re.sub(r"(lora_[AB])\.weight", r"\1.math.weight", key))
    with pytest.warns(UserWarning, match=rf"'odd'.*: {number} modules .* left out"):
        model = routed(base, {"odd": path})
    torch.testing.assert_close(logits(model), expected, atol=2e-6, rtol=1e-5)
    model.export_experts(str(tmp_path / "experts"))
    exported = logits(stock(base, tmp_path / "experts" / "odd"))
    torch.testing.assert_close(exported, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "stated",
    [
        {"target_modules": ["q", "v"]},
        {"target_modules": r"decoder\..*"},
        {"target_modules": "all-linear"},
        {"exclude_modules": r".*_proj"},
        {"layers_to_transform": [7]},
    ],
)
def test_factors_stay_where_the_configuration_targets_none(
    stated: dict[str, Any], tmp_path: Path
) -> None:
    base, path = make_base(), save_lora(tmp_path / "odd", 5)
    expected = logits(stock(base, path))
    edit(path, **stated)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*left out")
        model = routed(base, {"odd": path})
    torch.testing.assert_close(logits(model), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", OLD_NAMES)
@pytest.mark.parametrize("time", ["old", "new"])
def test_targets_by_old_and_by_new_names(kind: str, time: str, tmp_path: Path) -> None:
    base, path = old_names(tmp_path / "old", kind)
    expected = logits(stock(base, tmp_path / "new"))
    prefix = OLD_NAMES[kind][("new", "old").index(time)].removeprefix("model.")
    edit(path, target_modules=rf"{re.escape(prefix)}.*_proj|lm_head")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*left out")
        model = routed(base, {"one": path})
    torch.testing.assert_close(logits(model), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_copies_are_compared_with_the_checkpoint_where_only_the_config_is_loaded(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = make_base(tie_word_embeddings=tied)
    base.save_pretrained("base")
    path = save_lora(tmp_path / "math", 5, base=copy.deepcopy(base), target_modules=["lm_head"])
    compose("base", {"math": "math"}, "routed", router="uniform")
    loaded = AutoModelForCausalLM.from_pretrained("base").eval()
    model = PeftModel.from_pretrained(copy.deepcopy(loaded), "routed").eval()
    torch.testing.assert_close(logits(model), logits(stock(loaded, path)), atol=2e-6, rtol=0)

    rewrite(path, lambda tensors: {k: v if "lora_" in k else v + 1 for k, v in tensors.items()})
    with pytest.raises(UserError, match=r"lm_head\.base_layer\.weight: it is not the base model's"):
        compose("base", {"math": "math"}, "other", router="uniform")
    assert not Path("other").exists()


@pytest.mark.parametrize("merge", [True, False])
def test_a_projector_that_was_trained_whole_is_unloaded(merge: bool, tmp_path: Path) -> None:
    base, path = old_names(tmp_path / "odd")
    trained = {"modules_to_save": ["multi_modal_projector"]}
    model = routed(base, {"odd": path}, **trained)
    expected = logits(stock(base, path))
    unloaded = model.merge_and_unload() if merge else model.unload()
    if not merge:
        expected = logits(base)
    torch.testing.assert_close(logits(unloaded), expected, atol=1e-5, rtol=1e-5)
    projector = unloaded.model.multi_modal_projector
    assert type(projector) is type(base.model.multi_modal_projector)


@pytest.mark.parametrize("form", ["{}", "^{}", "escaped", "last part"])
def test_patterns_by_names_that_transformers_alone_renames(form: str, tmp_path: Path) -> None:
    """PEFT takes no factors of such an adapter: what counts is the adapter by its new names."""
    new, old = (name.removeprefix("model.") for name in OLD_NAMES["qwen2_vl"])
    module = "layers.0.self_attn.q_proj"
    base = vision_model("qwen2_vl")
    trained = {
        "target_modules": r".*language_model.*\.(q_proj|v_proj)",
        "alpha_pattern": {new + module: 100, "q_proj": 3},
        "rank_pattern": {new + module: 2},
    }
    path = save_lora(tmp_path / "new", 5, base=copy.deepcopy(base), **trained)
    expected = logits(stock(base, path))
    before = tmp_path / "old"
    shutil.copytree(path, before)
    rename(before, lambda key: key.replace(*OLD_NAMES["qwen2_vl"]))
    key = old + module
    if form == "last part":
        key = module
    elif form == "escaped":
        key = key.replace(".", r"\.")
    else:
        key = form.format(key)
    patterns = {"alpha_pattern": {key: 100, "q_proj": 3}, "rank_pattern": {key: 2}}
    edit(before, target_modules=["q_proj", "v_proj"], **patterns)
    model = routed(base, {"odd": before})
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    model.export_experts(str(tmp_path / "experts"))
    exported = logits(stock(base, tmp_path / "experts" / "odd"))
    torch.testing.assert_close(exported, expected, atol=1e-5, rtol=1e-5)


def test_patterns_by_old_names_are_pefts_where_peft_renames(tmp_path: Path) -> None:
    base, path = old_names(tmp_path / "odd")
    edit(path, alpha_pattern={"language_model.model.layers.0.self_attn.q_proj": 100})
    model = routed(base, {"odd": path})
    expected = logits(stock(base, path))
    torch.testing.assert_close(logits(model), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtypes", ["bfloat16 float32", "float32 bfloat16"])
def test_a_copy_equals_the_base_in_either_dtype(dtypes: str, tmp_path: Path) -> None:
    trained, loaded = (getattr(torch, name) for name in dtypes.split())
    base = make_base(dtype=torch.bfloat16)
    adapted = copy.deepcopy(base).to(trained)
    path = save_lora(tmp_path / "math", 5, base=adapted, target_modules=["lm_head"])
    assert load_file(path / WEIGHTS)["base_model.model.lm_head.base_layer.weight"].dtype == trained
    routed(base.to(loaded), {"math": path})


def test_the_way_out_of_a_larger_vocabulary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    trained = grown()
    save_with_embeddings(tmp_path / "odd", trained)
    with pytest.raises(UserError, match="vocabulary") as caught:
        routed(make_base(), {"odd": "odd"})
    # What the message says, word for word.
    names = {"base": make_base(), "PeftModel": PeftModel}
    for step in (
        r"base\.resize_token_embeddings\(\d+\)",
        r"PeftModel\.from.+save_pretrained\(.+?\)",
    ):
        exec(re.findall(step, caught.value.message)[0], names)
    base = AutoModelForCausalLM.from_pretrained("new-base").eval()
    model = routed(base, {"odd": "odd"})
    torch.testing.assert_close(logits(model), logits(stock(trained, tmp_path / "odd")))


@pytest.mark.parametrize("kind", ["LoHa", "LoKr", "Vera"])
def test_the_way_out_of_other_types(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = {} if kind == "Vera" else {"init_weights": False}
    config = getattr(peft, f"{kind}Config")(r=4, target_modules=["v_proj"], **weights)
    torch.manual_seed(0)
    other = get_peft_model(make_base(), config).eval()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "vera_lambda" in name:
                parameter.normal_()
    other.save_pretrained("odd")
    with pytest.raises(UserError, match="only LORA adapters") as caught:
        routed(make_base(), {"odd": "odd"})
    names = {"base": make_base(), "PeftModel": PeftModel, "peft": peft}
    exec(re.findall(r"peft\.save_as_lora\(.+rank=16\)", caught.value.message)[0], names)
    expected = logits(other)
    assert (expected - logits(make_base())).abs().max() > 1e-3
    model = routed(make_base(), {"odd": "lora"})
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=0)


def test_unknown_fields_that_say_something_are_a_warning(tmp_path: Path) -> None:
    base, path = of_another_peft(tmp_path / "odd")
    with pytest.warns(UserWarning, match=r"expert 'one' .* says use_tomorrow=True, which PEFT .*"):
        routed(base, {"one": path})
    edit(path, use_tomorrow=None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        routed(base, {"one": path})


@pytest.mark.parametrize("target", ["attention", "out_proj"])
def test_no_part_of_multihead_attention_is_routed(target: str, tmp_path: Path) -> None:
    base, path = on_attention("attention")(tmp_path / "odd")
    kept = "base_layer.out_proj" if target == "out_proj" else "attention.lora_"
    rewrite(path, lambda tensors: {k: v for k, v in tensors.items() if kept in k})
    if target == "out_proj":
        rename(path, lambda key: key.replace(".base_layer", ""))
    with pytest.raises(UserError, match="MultiheadAttention, which multiplies by its weights"):
        routed(base, {"odd": path})


@pytest.mark.parametrize("content", [[torch.ones(1)], {"weight": 3}, {1: torch.ones(1)}])
def test_a_pickle_of_something_else_is_refused(content: Any, tmp_path: Path) -> None:
    base, path = a_pickle(tmp_path / "odd")
    torch.save(content, path / "adapter_model.bin")
    with pytest.raises(UserError, match=r"adapter_model.bin holds a \w+ where tensors"):
        routed(base, {"odd": path})


def test_a_pickle_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, path = a_pickle(tmp_path / "odd")

    def download(repository: str, name: str, subfolder: str | None, revision: str | None) -> str:
        if not (path / name).exists():
            raise EntryNotFoundError(f"{repository} has no {name}")
        return str(path / name)

    monkeypatch.setattr("peft_routing.adapter_files.hf_hub_download", download)
    expected = logits(stock(base, path))
    model = routed(base, {"one": "someone/odd"})
    torch.testing.assert_close(logits(model), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (b"", "is empty"),
        (b"garbage" * 9, "is damaged: torch.load cannot read it"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
    ],
)
def test_a_damaged_pickle_is_named(damage: bytes, reason: str, tmp_path: Path) -> None:
    base, path = a_pickle(tmp_path / "odd")
    (path / "adapter_model.bin").write_bytes(damage)
    with pytest.raises(UserError, match=rf"adapter_model.bin {reason}"):
        routed(base, {"odd": path})


# The bias of lora_B


def biased(tmp_path: Path, **config: Any) -> dict[str, Path]:
    """Three adapters, of which the last has no bias."""
    base = make_base(attention_bias=True)
    experts = {}
    for seed, name in enumerate(("math", "code", "law")):
        options = {"target_modules": ["q_proj", "o_proj"], "lora_bias": name != "law", **config}
        experts[name] = save_lora(tmp_path / name, seed, base=copy.deepcopy(base), **options)
    return experts


def naive(base: Any, experts: Mapping[str, Path], weights: list[float], low_rank: bool) -> Tensor:
    """Logits of the base with each module's update added by a loop over the experts' files."""
    model = copy.deepcopy(base)
    scaling = 2.0  # alpha 8, rank 4
    files = [load_file(path / WEIGHTS) for path in experts.values()]
    for name, module in model.named_modules():
        prefix = f"base_model.model.{name}.lora_"
        if f"{prefix}A.weight" not in files[0]:
            continue

        def add(module: Any, inputs: Any, output: Tensor, prefix: str = prefix) -> Tensor:
            (x,) = inputs
            mean_a = sum(w * f[f"{prefix}A.weight"] for w, f in zip(weights, files, strict=True))
            for weight, file in zip(weights, files, strict=True):
                a = mean_a if low_rank else file[f"{prefix}A.weight"]
                update = x @ a.T @ file[f"{prefix}B.weight"].T
                update = update + file.get(f"{prefix}B.bias", 0)
                output = output + weight * scaling * update
            return output

        module.register_forward_hook(add)
    return logits(model)


@pytest.mark.parametrize("mixing", ["full", "low_rank"])
def test_biases_are_mixed_with_their_experts(mixing: str, tmp_path: Path) -> None:
    base = make_base(attention_bias=True)
    experts = biased(tmp_path)
    weights = [0.5, 0.3, 0.7]
    model = routed(base, experts, router="fixed", weights=weights, mixing=mixing)
    expected = naive(base, experts, weights, mixing == "low_rank")
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)

    one = tmp_path / "one"
    model.to_lora(str(one))
    torch.testing.assert_close(logits(stock(base, one)), expected, atol=1e-5, rtol=0)
    before = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits(model.merge_and_unload()), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("router", ["arrow", "linear", "mlp", "layer"])
def test_biases_go_with_every_router_and_through_files(router: str, tmp_path: Path) -> None:
    base = make_base(attention_bias=True)
    options = {"top_k": 2} if router == "arrow" else {}
    model = routed(base, biased(tmp_path), router=router, **options)
    model.save_pretrained(tmp_path / "routed")
    again = PeftModel.from_pretrained(
        copy.deepcopy(base), tmp_path / "routed", low_cpu_mem_usage=True
    ).eval()
    assert torch.equal(logits(again), logits(model))
    # Of a router that has chosen one expert, nothing is left but PEFT's own logits of it.
    for index, name in enumerate(("math", "code", "law")):
        alone = nn.functional.one_hot(torch.tensor(index), 3).float()
        with torch.no_grad():
            output = model(input_ids=IDS, coefficients=alone).logits
        expected = logits(stock(base, tmp_path / name))
        torch.testing.assert_close(output, expected, atol=2e-6, rtol=1e-5)


def test_biases_stay_with_their_experts_when_others_come_and_go(tmp_path: Path) -> None:
    base = make_base(attention_bias=True)
    experts = biased(tmp_path)
    law = experts.pop("law")
    model = routed(base, experts)
    model.add_expert("law", str(law))
    expected = routed(base, {**experts, "law": law})
    assert torch.equal(logits(model), logits(expected))
    model.remove_expert("math")
    model.remove_expert("code")
    assert not any(name.endswith("biases") for name, _ in model.named_parameters())
    torch.testing.assert_close(logits(model), logits(stock(base, law)), atol=2e-6, rtol=1e-5)


def test_biases_of_general_experts_are_subtracted(tmp_path: Path) -> None:
    base = make_base(attention_bias=True)
    experts = biased(tmp_path)
    general = {"math": str(experts.pop("math"))}
    model = routed(base, experts, general_experts=general, router="fixed", weights=[0.5, 0.25])
    expected = naive(base, biased(tmp_path / "again"), [-0.75, 0.5, 0.25], low_rank=False)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)


def test_biases_where_the_base_has_none_are_routed_and_not_merged(tmp_path: Path) -> None:
    base = make_base()
    path = save_lora(tmp_path / "math", 5, base=copy.deepcopy(base), lora_bias=True)
    model = routed(base, {"math": path})
    expected = logits(stock(base, path))
    torch.testing.assert_close(logits(model), expected, atol=2e-6, rtol=1e-5)
    with pytest.raises(UserError, match=r"cannot be merged: its experts have a bias at model\."):
        model.merge_and_unload()
    torch.testing.assert_close(logits(model), expected, atol=2e-6, rtol=1e-5)


def test_a_bias_that_the_configuration_denies_is_refused(tmp_path: Path) -> None:
    base, path = with_biases(tmp_path / "odd")
    edit(path, lora_bias=False)
    with pytest.raises(UserError, match=r"has a bias at model\..*, and .* says lora_bias: false"):
        routed(base, {"odd": path})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda key, value: (key.replace("q_proj", "k_proj"), value), "and no B of as many rows"),
        (lambda key, value: (key, value[1:]), r"has a bias \(\d+,\), and no B of as many rows"),
        (lambda key, value: (key.replace("lora_B", "lora_A"), value), "is not a LoRA factor"),
    ],
)
def test_a_bias_that_fits_no_factor_is_refused(
    change: Callable[[str, Tensor], tuple[str, Tensor]], reason: str, tmp_path: Path
) -> None:
    base, path = with_biases(tmp_path / "odd")
    edit(path, target_modules=[*TARGETS, "k_proj"])
    changed = {}
    for key, value in load_file(path / WEIGHTS).items():
        new = change(key, value) if key.endswith(".bias") else (key, value)
        changed[new[0]] = new[1]
    rewrite(path, lambda _: changed)
    with pytest.raises(UserError, match=reason):
        routed(base, {"odd": path})


# Where adapters are


LOCAL = ("here/math", "math", "./math", "/nowhere/math", "a/math/", "a\\b")


@pytest.mark.parametrize("path", LOCAL)
def test_a_path_that_looks_local_is_no_question_to_the_hub(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()

    def ask(*_: Any, **__: Any) -> str:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("peft_routing.adapter_files.hf_hub_download", ask)
    with pytest.raises(FileNotFoundError, match=r"'one'.*there is no such directory"):
        get_peft_model(make_base(), RoutedLoraConfig(experts={"one": path}))
    with pytest.raises(FileNotFoundError, match=r"'lora'.*there is no such directory"):
        get_peft_model(make_base(), RoutedLoraConfig(experts=[Path("owner/lora")]))
    with pytest.raises(AssertionError, match="asked"):
        get_peft_model(make_base(), RoutedLoraConfig(experts=["owner/lora"]))


def test_every_subdirectory_that_holds_an_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_base().save_pretrained("base")
    for seed, name in enumerate(("law", "code", "math")):
        save_lora(Path("experts", name), seed)
    Path("experts", "notes").mkdir()
    Path("experts", "README.md").write_text("three experts")
    config = compose("base", {}, "routed", experts_from="experts", router="layer")
    assert config.names == ["code", "law", "math"]
    compose("base", {n: f"experts/{n}" for n in config.names}, "named", router="layer")
    for name in (CONFIG, WEIGHTS):
        assert Path("routed", name).read_bytes() == Path("named", name).read_bytes()

    command = ["compose", "base", "--experts-from", "experts", "--router", "layer", "-o", "said"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0 and "3 experts (code, law, math)" in result.output, result.output
    assert Path("said", CONFIG).read_bytes() == Path("named", CONFIG).read_bytes()
    result = CliRunner().invoke(main, ["compose", "base", "-o", "never"])
    complaint = "name them with --expert, --experts-from or --library"
    assert result.exit_code == 1 and complaint in result.output

    shutil.copytree("experts/law", "more")
    config = compose("base", {"more": "more"}, "four", experts_from="experts", router="layer")
    assert config.names == ["more", "code", "law", "math"]
    wrong = {
        "experts/law": "is an adapter itself",
        "experts/notes": "no subdirectory of experts/notes has an adapter_config.json",
        "nowhere": "nowhere: there is no such directory",
    }
    for directory, reason in wrong.items():
        with pytest.raises(UserError, match=reason):
            compose("base", {}, "never", experts_from=directory)
    with pytest.raises(UserError, match="an expert is named 'law', and so is a subdirectory of ex"):
        compose("base", ["experts/law"], "never", experts_from="experts")
    assert not Path("never").exists()
