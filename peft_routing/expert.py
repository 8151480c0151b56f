"""Ordinary LoRA adapters as experts: how they are read, and whether they fit a model."""

import dataclasses
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import CONFIG_NAME
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import get_pattern_key
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from _mergekit_moe_ext_common.checkpoints import check_finite
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.loading import explained
from peft_routing.adapter_files import read_config, read_labels, read_tensors
from peft_routing.base_tensors import check_base_tensors, is_output_embedding
from peft_routing.moved import PREFIX, in_names_of, name_in, patterns_in

_FACTOR = re.compile(r"(.+)\.lora_(?:([AB])\.weight|B\.bias)")
_NAMED_HEAD = re.compile(r"(.+)\.modules_to_save\.[^.]+\.(.+)")
_NAMED_FACTOR = re.compile(r"(.+\.lora_[AB])(?:\.([^.]+))?\.(weight|bias)")
_CANNOT_BE_ROUTED = {
    "use_dora": "DoRA divides by the norm of the merged weight, so its updates do not add up",
    "target_parameters": "its updates are of parameters, not of linear modules",
    "layer_replication": "its layers are not those of the base model",
    "trainable_token_indices": "embeddings have no hidden state to route by",
    "alora_invocation_tokens": "aLoRA is off before its invocation tokens",
    "arrow_config": "it is a router already",
    "use_qalora": "QA-LoRA pools its input",
    "lora_ga_config": "LoRA-GA changes the base model's weights",
    "kasa_config": "KaSA changes the base model's weights",
    "monteclora_config": "MonteCLoRA draws its updates at random",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
}
# The fields of a configuration that say at which modules the update is.
_PLACES = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
)
# What PEFT's classes of these tasks add to `modules_to_save`.
HEADS_OF_TASKS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Expert:
    """A LoRA adapter: A (rank, in), B (out, rank) and the scaling of B A, by module.

    biases: what is added to B A x before the scaling (out), where the adapter has such.
    head: the tensors of the modules that PEFT saved whole beside it, by their names in the model.
    labels: the names of the classes, where they are known.
    path: the directory or repository that it was read from; empty for one of a routed adapter.
    """

    name: str
    config: dict[str, Any]
    factors: dict[str, tuple[Tensor, Tensor]]
    scalings: dict[str, float]
    biases: dict[str, Tensor] = field(default_factory=dict)
    head: dict[str, Tensor] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    path: str = ""

    def rank(self, module: str) -> int:
        """The rank of the update at a module, 0 where there is none."""
        return self.factors[module][0].shape[0] if module in self.factors else 0


def read_expert(name: str, path: str, model: nn.Module) -> Expert:
    """The expert in a directory, or in `owner/name[/subfolder]` on the Hub, for a base model.

    The names of its modules are those of the model, as PEFT would find them. `UserError` for what
    cannot be routed, `FileNotFoundError` for what is not there.
    """
    where = f"expert {name!r} ({path})"
    config = read_config(path, where)
    _check_config(config, path, where)
    _warn_of_unknown_fields(config, where)
    # A model says by this how its modules were once called, where its code came with it.
    key_mapping = getattr(model, "_checkpoint_conversion_mapping", {})
    tensors = read_tensors(path, where, key_mapping)
    check_finite(tensors, where)
    _check_whole(tensors, where)
    tensors = _without_adapter_name(tensors, where)
    with explained(f"{where}: {CONFIG_NAME} cannot be used", path):
        tensors = _at_targets(tensors, config, model, where)
    with explained(f"{where} does not fit a {type(model).__name__}", path):
        tensors, is_unknown_to_peft = in_names_of(model, tensors)
    with explained(f"{where}: {CONFIG_NAME} cannot be used", path):
        config = patterns_in(model, config) if is_unknown_to_peft else config
    factors, biases, others = _parts(tensors, where)
    _check_places(factors, model, where)
    # PEFT's classes for classifiers add these; its first versions did not write them down.
    heads_of_task = HEADS_OF_TASKS.get(config.get("task_type") or "", ())
    head = _head(others, config.get("modules_to_save") or heads_of_task)
    if head and not config.get("modules_to_save"):
        config["modules_to_save"] = list(heads_of_task)
    others = _without_head(others, head, model)
    check_base_tensors(others, model, path, where)
    if not factors:
        raise UserError(f"{where}: its file of weights holds no LoRA factors")
    if biases and not config.get("lora_bias"):
        raise UserError(
            f"{where}: it has a bias at {min(biases)}, and {CONFIG_NAME} says lora_bias: false"
        )
    with explained(f"{where}: {CONFIG_NAME} cannot be used", path):
        scalings = {
            module: _scaling(config, module, a.shape[0], where)
            for module, (a, _) in factors.items()
        }
    stated = {key: value for key, value in config.items() if value not in (None, {}, [])}
    labels = read_labels(path) if head else ()
    return Expert(name, stated, factors, scalings, biases, head, labels, path)


def _head(others: Mapping[str, Tensor], modules_to_save: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of the modules that were saved whole, by their names in the model."""
    head = {}
    for key, tensor in others.items():
        name = key.removeprefix(PREFIX)
        # PEFT takes every module whose name ends like one of these.
        module = name
        while "." in module:
            module = module.rpartition(".")[0]
            if module.endswith(tuple(modules_to_save)):
                head[name] = tensor
    return head


def _without_head(
    others: Mapping[str, Tensor], head: Mapping[str, Tensor], model: nn.Module
) -> dict[str, Tensor]:
    """The tensors that are neither of the modules that were saved whole nor tied to one of them,
    of which PEFT may save a copy.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    left = {}
    for key, tensor in others.items():
        name = key.removeprefix(PREFIX)
        of_head = head.get(name, head.get(tied.get(name, "")))
        if of_head is None or not torch.equal(of_head, tensor):
            left[key] = tensor
    return left


def _check_config(config: dict[str, Any], path: str, where: str) -> None:
    """`UserError` for an adapter whose update is not a sum of B A at linear modules."""
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        raise UserError(
            f"{where}: its peft_type is {peft_type}; only LORA adapters are routed"
            f"{_way_to_lora(peft_type, path)}"
        )
    for key, reason in _CANNOT_BE_ROUTED.items():
        if config.get(key):
            raise UserError(f"{where} cannot be routed: {key} is {config[key]}; {reason}")
    if config.get("bias", "none") != "none":
        raise UserError(
            f"{where} cannot be routed: bias is {config['bias']!r}; biases are not routed"
        )
    # PEFT does not mind the case of some of these.
    if str(config.get("init_lora_weights", "")).lower().startswith(_CHANGES_THE_BASE):
        raise UserError(
            f"{where} cannot be routed: init_lora_weights is {config['init_lora_weights']!r}, "
            "which changes the base model; save it with path_initial_model_for_weight_conversion "
            "first"
        )


def _way_to_lora(peft_type: Any, path: str) -> str:
    """What to say of an adapter of another type: how it becomes a LoRA, if it can."""
    if peft_type == "ROUTED_LORA":
        return f": peft-route export {path} -o experts/ writes the experts of this one as such"
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(str(peft_type))
    layer = getattr(tuner, "tuner_layer_cls", BaseTunerLayer)
    kinds = () if layer in (BaseTunerLayer, LoraLayer) else (layer, *layer.__subclasses__())
    if any("supports_lora_conversion" in vars(kind) for kind in kinds):
        return (
            f": peft.save_as_lora('lora/', PeftModel.from_pretrained(base, {path!r}), rank=16) "
            "writes it as one"
        )
    return ", and PEFT cannot write this type as one"


def _warn_of_unknown_fields(config: Mapping[str, Any], where: str) -> None:
    """A warning where another PEFT wrote a field that says something and is not known here."""
    known = {each.name for each in dataclasses.fields(LoraConfig)}
    unknown = []
    for key, value in config.items():
        if key not in known and value not in (None, False, {}, []):
            unknown.append(f"{key}={value!r}")
    if unknown:
        warnings.warn(
            f"{where}: {CONFIG_NAME} says {', '.join(unknown)}, which PEFT {peft.__version__} does "
            "not know and ignores, and so is ignored here",
            stacklevel=3,
        )


def _check_whole(tensors: Mapping[str, Tensor], where: str) -> None:
    """`UserError` for factors of which there is only what one process held of them, or nothing."""
    in_parts = []
    for key, tensor in tensors.items():
        is_factor = ".lora_A." in key or ".lora_B." in key
        if not tensor.numel() or (is_factor and key.endswith(".weight") and tensor.ndim < 2):
            in_parts.append(key)
    if in_parts:
        first = in_parts[0]
        others = f", and {len(in_parts) - 1} more are like it" if len(in_parts) > 1 else ""
        raise UserError(
            f"{where} cannot be routed: {first} has the shape {tuple(tensors[first].shape)}"
            f"{others}: DeepSpeed ZeRO-3 or FSDP saved it without gathering its parts. Rebuild it "
            "from the training checkpoint (zero_to_fp32.py), or save it again with "
            "stage3_gather_16bit_weights_on_model_save: true"
        )


def _without_adapter_name(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors as `save_pretrained` names them: `lora_A.weight` for `lora_A.default.weight`,
    which is the name in `model.state_dict()`.

    `UserError` where the file holds several adapters.
    """
    renamed = {}
    adapters = set()
    for key, tensor in tensors.items():
        match = _NAMED_FACTOR.fullmatch(key)
        if match is None:
            head = _NAMED_HEAD.fullmatch(key)
            renamed[f"{head[1]}.{head[2]}" if head else key] = tensor
            continue
        adapters.add(match[2] or "")
        renamed[f"{match[1]}.{match[3]}"] = tensor
    if len(adapters) > 1:
        names = ", ".join(repr(name) for name in sorted(adapters))
        raise UserError(
            f"{where} cannot be routed: its file holds several adapters, {names}: save each in a "
            "directory of its own"
        )
    return renamed


def _at_targets(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], model: nn.Module, where: str
) -> dict[str, Tensor]:
    """The tensors without the factors that PEFT would leave out, with a warning: those of modules
    that the configuration does not target.

    All are kept where it targets none of them: it has other names for them then, or says at
    loading which they are.
    """
    places = LoraConfig(**{name: config.get(name) for name in ("task_type", *_PLACES)})
    stated = [name for name in _PLACES if config.get(name) not in (None, [], "")]
    if places.target_modules is None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        places.target_modules = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
        stated.append(f"PEFT's target_modules of {kind}")
    if places.target_modules is None:  # PEFT would ask for them
        return dict(tensors)
    places = _maybe_include_all_linear_layers(places, model)
    modules = {}
    for key in tensors:
        match = _FACTOR.fullmatch(key.removeprefix(PREFIX))
        # What lies in a layer of PEFT's own has a name that no configuration says.
        if match is not None and ".base_layer" not in match[1]:
            modules[key] = match[1]
    of_file = list(dict.fromkeys(modules.values()))
    left_out = [module for module in of_file if not _is_targeted(places, module, model)]
    if not left_out or len(left_out) == len(of_file):
        return dict(tensors)
    number = f"{len(left_out)} of its {len(of_file)} modules are"
    if len(left_out) == 1:
        number = f"1 of its {len(of_file)} modules is"
    warnings.warn(
        f"{where}: its file has factors at {left_out[0]}, where {CONFIG_NAME} applies none "
        f"({', '.join(stated)}): {number} left out, as PEFT leaves them out",
        stacklevel=3,
    )
    unused = set(left_out)
    return {key: tensor for key, tensor in tensors.items() if modules.get(key) not in unused}


def _is_targeted(places: LoraConfig, module: str, model: nn.Module) -> bool:
    """Whether a configuration targets a module, by its name in the file or by that in the model,
    which is the one that PEFT has.
    """
    if check_target_module_exists(places, module):
        return True
    moved = name_in(model, f"{module}.weight").removesuffix(".weight")
    return bool(check_target_module_exists(places, moved))


_Parts = tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor], dict[str, Tensor]]


def _parts(tensors: Mapping[str, Tensor], where: str) -> _Parts:
    """A (rank, in) and B (out, rank) of each module, the bias (out) of B where it has one, and the
    other tensors by their keys. `UserError` for factors that do not fit each other.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    biases = {}
    others = {}
    for key, tensor in tensors.items():
        # Embeddings have other reasons than the tensors beside their factors.
        if "lora_embedding" in key:
            reason = "embeddings have no hidden state to route by"
            raise UserError(f"{where} cannot be routed: {key}: {reason}")
        match = _FACTOR.fullmatch(key.removeprefix(PREFIX))
        if match is None:
            others[key] = tensor
        elif match[2] is None:
            biases[match[1]] = tensor
        elif tensor.ndim != 2:
            raise UserError(
                f"{where} cannot be routed: {key} has {tensor.ndim} dimensions; only linear "
                "modules are"
            )
        else:
            halves.setdefault(match[1], {})[match[2]] = tensor
    for module, pair in halves.items():
        if len(pair) == 1:
            raise UserError(f"{where}: {module} has lora_{min(pair)} but not the other factor")
        if pair["A"].shape[0] != pair["B"].shape[1]:
            raise UserError(
                f"{where}: {module}: A is {tuple(pair['A'].shape)} and B is "
                f"{tuple(pair['B'].shape)}"
            )
    for module, bias in biases.items():
        if module not in halves or bias.shape != halves[module]["B"].shape[:1]:
            raise UserError(
                f"{where}: {module} has a bias {tuple(bias.shape)}, and no B of as many rows"
            )
    factors = {module: (pair["A"], pair["B"]) for module, pair in halves.items()}
    return factors, biases, others


def _check_places(names: Iterable[str], model: nn.Module, where: str) -> None:
    """`UserError` where a factor belongs to what is no module that is called with hidden states."""
    modules = {name.replace(".base_layer", ""): module for name, module in model.named_modules()}
    for name in names:
        inner = name.replace(".base_layer", "")
        for around in (inner, inner.rpartition(".")[0]):
            if isinstance(modules.get(around), nn.MultiheadAttention):
                raise UserError(
                    f"{where} cannot be routed: {name} is a MultiheadAttention, which multiplies "
                    "by its weights itself and calls no linear module, so that there is no hidden "
                    "state to route by"
                )
        # Where PEFT puts a LoRA around another one, as of the fused experts of a mixture.
        if inner != name:
            raise UserError(
                f"{where} cannot be routed: {name} is an update of a parameter, not of a linear "
                "module"
            )


def _scaling(config: dict[str, Any], module: str, rank: int, where: str) -> float:
    """The scaling of a module's update: alpha / r, or alpha / sqrt(r) for rsLoRA.

    `rank_pattern` and `alpha_pattern` hold for the modules that PEFT takes them for. `UserError`
    where the stored rank is not the stated one.
    """

    def value(name: str, pattern: str) -> Any:
        patterns = config.get(pattern) or {}
        default = config.get(name, getattr(LoraConfig, name))
        return patterns.get(get_pattern_key(patterns.keys(), module), default)

    if rank != value("r", "rank_pattern"):
        raise UserError(
            f"{where}: {module} has rank {rank}, and {CONFIG_NAME} says "
            f"{value('r', 'rank_pattern')}"
        )
    alpha = value("lora_alpha", "alpha_pattern")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def check_experts(experts: Sequence[Expert], model: nn.Module) -> None:
    """Checks that the experts fit the model.

    `UserError` where they do not; a warning where they were trained on a base model of another
    name.
    """
    # Where other adapters are on the model, PEFT has wrapped its modules; experts name the modules
    # as they were before.
    modules = {name.replace(".base_layer", ""): module for name, module in model.named_modules()}
    base_name = model.__dict__.get("name_or_path")
    for expert in experts:
        of_other_base = _of_other_base(expert, base_name)
        for name in expert.factors:
            if name not in modules:
                last = name.rpartition(".")[2]
                alike = next((other for other in modules if other.endswith(last)), None)
                hint = f", which has {alike}" if alike else ""
                raise UserError(f"{of_other_base}: {name} is not in the base model{hint}")
            _check_fits(expert, name, modules[name], model, of_other_base)
    _warn_of_other_bases(experts, base_name)


def _check_fits(
    expert: Expert, name: str, module: nn.Module, model: nn.Module, of_other_base: str
) -> None:
    """`UserError` where an expert's factors at a module are not of the module's sizes.

    `of_other_base` is the beginning of what is said then.
    """
    a, b = expert.factors[name]
    where = f"{_named(expert)}: {name}"
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if not _is_linear(base):
        raise UserError(f"{where} is a {type(base).__name__}; only linear modules are routed")
    in_features, out_features = _get_in_out_features(base)
    if b.shape[0] != out_features and is_output_embedding(model, module):
        raise UserError(
            f"{where}: it was trained on a vocabulary of {b.shape[0]} tokens, and the base "
            f"model has {out_features}: resize the base as for its training "
            f"(base.resize_token_embeddings({b.shape[0]})), save it, and name that instead"
        )
    if (a.shape[1], b.shape[0]) != (in_features, out_features):
        raise UserError(
            f"{of_other_base}: {name} maps {a.shape[1]} to {b.shape[0]}, and {in_features} "
            f"to {out_features} in the base model"
        )


def _named(expert: Expert) -> str:
    """An expert by its name and, where it has one, its directory."""
    return f"expert {expert.name!r} ({expert.path})" if expert.path else f"expert {expert.name!r}"


def _of_other_base(expert: Expert, base_name: str | None) -> str:
    """The beginning of what is said of an expert that does not fit the base model."""
    trained_on = expert.config.get("base_model_name_or_path")
    if trained_on and not _are_one_base(trained_on, base_name):
        return f"{_named(expert)} was trained on another base model, {trained_on}"
    return f"{_named(expert)} does not fit the base model"


def _are_one_base(first: Any, second: Any) -> bool:
    """Whether two names of base models are the same, or lead to the same directory."""
    directories = []
    for name in (first, second):
        directory = Path(str(name)).expanduser()
        directories.append(directory.resolve() if directory.is_dir() else name)
    return bool(directories[0] == directories[1])


def _warn_of_other_bases(experts: Sequence[Expert], base_name: str | None) -> None:
    """A warning where experts name another base model than this one."""
    others = {}
    for expert in experts:
        trained_on = expert.config.get("base_model_name_or_path")
        if base_name and trained_on and not _are_one_base(trained_on, base_name):
            others[expert.name] = trained_on
    if others:
        first = next(iter(others))
        warnings.warn(
            f"the base model is {base_name}, but {len(others)} of {len(experts)} experts were "
            f"trained on another: {first!r} on {others[first]}",
            stacklevel=3,
        )


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is linear, quantised or not.

    Some libraries keep `nn.Linear` for a quantised module. The classes of others (GPTQ, AWQ, HQQ)
    have the names of its two sizes, which convolutions and embeddings do not have.
    """
    return isinstance(module, nn.Linear | Conv1D) or (
        hasattr(module, "in_features") and hasattr(module, "out_features")
    )


def layout(experts: Sequence[Expert], model: nn.Module) -> list[dict[str, Any]]:
    """The modules that any expert changes, in the model's order, grouped by the experts' ranks and
    scalings there, and by whether any has a bias, as a configuration saves them.
    """
    touched: set[str] = set()
    for expert in experts:
        touched.update(expert.factors)
    groups: dict[tuple[Any, Any, bool], list[str]] = {}
    for name, _ in model.named_modules():
        if name in touched:
            ranks = tuple(expert.rank(name) for expert in experts)
            scalings = tuple(float(expert.scalings.get(name, 0.0)) for expert in experts)
            has_biases = any(name in expert.biases for expert in experts)
            groups.setdefault((ranks, scalings, has_biases), []).append(name)
    described = []
    for (ranks, scalings, has_biases), modules in groups.items():
        group = {"modules": modules, "ranks": list(ranks), "scalings": list(scalings)}
        described.append({**group, "has_biases": True} if has_biases else group)
    return described
