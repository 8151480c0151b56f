"""A weight-ensembling model whose coefficients do not depend on the input becomes the stock model
of its base.
"""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from _mergekit_moe_ext_common.cards import extend_card, in_markdown
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.staging import (
    check_output,
    check_room,
    copy_files,
    model_folder,
    staged,
)
from mergekit_moe_ext.merging.card import renew_loading
from mergekit_moe_ext.merging.outputs import complete_model
from mergekit_moe_ext.modeling.any_base import auto_class_of
from mergekit_moe_ext.modeling.configuration_wemoe import Ensembling, vectors_of
from mergekit_moe_ext.modeling.modeling_clip_heads import CLIPVisionForImageClassification
from mergekit_moe_ext.modeling.wemoe_products import EnsembledLinear
from mergekit_moe_ext.wemoe.loading import load_ensemble, read_ensemble

LOG = logging.getLogger(__name__)
_WITHOUT_HEADS = "It is the vision tower alone: its heads stay in the files that they came from."


def unload(model_path: str, output: str, task: str | None = None) -> type[PreTrainedModel]:
    """Merge the task vectors into the weights and write the result to `output`; returns its class.

    `task` picks one of several heads. `UserError` where routers read the input, or a head must be
    picked.
    """
    out = check_output(output)
    architecture, config = read_ensemble(model_path)
    ensembling = config.ensembling
    if ensembling["router_layers"]:
        raise UserError(
            f"the coefficients of {model_path} depend on the input (router_layers: "
            f"{ensembling['router_layers']}), so that no single set of weights stands for it; "
            "merge with router_layers: 0"
        )
    is_tower = issubclass(architecture, CLIPVisionForImageClassification)
    heads = {} if is_tower else ensembling["heads"]
    task = next(iter(heads)) if len(heads) == 1 and task is None else task
    if heads and task not in heads:
        problem = f"has no head {task!r}" if task else "has a head per task"
        raise UserError(f"{model_path} {problem}: choose one with --task: {', '.join(heads)}")
    if task and not heads:
        raise UserError(f"{model_path} becomes one model for all tasks; leave --task out")
    model = load_ensemble(model_path, architecture, config)
    stock = _stock(model, task)
    check_room(out, sum(p.nbytes for p in stock.parameters()))
    with staged(out) as directory:
        source = model_folder(model_path)
        copy_files(source, directory)
        # Unless the stock model generates, it has none.
        (directory / "generation_config.json").unlink(missing_ok=True)
        stock.save_pretrained(directory)
        complete_model(directory, stock.config, source, model_path)
        renew_loading(directory, auto_class_of(type(stock).__name__), remote_code=False)
        head = f" with the head of {in_markdown(task)}" if task else ""
        note = (
            "Its coefficients were constants and are merged into the weights: a stock "
            f"{type(stock).__name__}{head}."
        )
        lines = ["## Unloaded", "", note]
        if is_tower:
            lines.append(_WITHOUT_HEADS)
        extend_card(directory, lines)
    if is_tower:
        LOG.info(_WITHOUT_HEADS)
    return type(stock)


@torch.no_grad()
def _stock(model: Any, task: str | None) -> PreTrainedModel:
    """The stock model of the base's class, with what `model` has at its constants and, of several
    heads, that of the task.
    """
    base = _base_of(type(model))
    state = _merged_state(model)
    config = _stock_config(model.config, base)
    if model.ensembling.head:
        _take_head(state, config, model.ensembling, task)
    with torch.device("meta"):
        stock = base._from_config(config, dtype=model.dtype)
    stock.load_state_dict(state, assign=True)
    stock.tie_weights()
    if model.can_generate():
        stock.generation_config = model.generation_config
    return stock


def _merged_state(model: Any) -> dict[str, Tensor]:
    """The model's tensors without what is ours alone, their task vectors merged into them."""
    ensembled: dict[str, EnsembledLinear] = {}
    for name, module in model.named_modules():
        if isinstance(module, EnsembledLinear):
            ensembled[name] = module
    state = _state_of_base(model, ensembled)
    for index, (group, linears) in enumerate(model.ensembling.groups.items()):
        router = model.routers["0" if model.ensembling.shared_router else str(index)]
        c = router.bias.float()  # a router without layers is its bias (WEMoE, equation 4)
        if model.ensembling.per_tensor:
            state[group] = _merged_parameter(model, group, c)
            continue
        for name in linears:
            linear = ensembled[name]
            dtype = linear.weight.dtype
            linear.float()
            state[f"{name}.weight"] = linear.merged(c).to(dtype)
            if linear.bias is not None:
                state[f"{name}.bias"] = (linear.bias + c @ linear.bias_vectors).to(dtype)
            linear.to("meta")  # its task vectors are not needed again
    # Of tied tensors one alone was merged.
    for name, source in model.all_tied_weights_keys.items():
        state[name] = state[source]
    return state


def _state_of_base(model: Any, ensembled: Mapping[str, EnsembledLinear]) -> dict[str, Tensor]:
    """The tensors that the stock model has, too: neither task vectors nor routers.

    ensembled: the ensembled linear modules by name.
    """
    vectors: set[str] = set()
    if model.ensembling.per_tensor:
        vectors.update(map(vectors_of, model.ensembling.groups))
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        owner, _, part = name.rpartition(".")
        is_ours = name in vectors or (owner in ensembled and part not in ("weight", "bias"))
        if not is_ours and not name.startswith("routers."):
            state[name] = tensor
    return state


def _take_head(
    state: dict[str, Tensor], config: Any, ensembling: Ensembling, task: str | None
) -> None:
    """Put the head of the task, if there is one, in the place of all heads, with its classes."""
    head = ensembling.head
    heads = {}
    for name in list(state):
        if name.startswith(f"{head}."):
            heads[name] = state.pop(name)
    if not task:
        return
    place = list(ensembling.heads).index(task)
    for part in ("weight", "bias"):
        name = f"{head}.{place}.{part}"
        if name in heads:
            state[f"{head}.{part}"] = heads[name]
    classes = ensembling.heads[task]
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: number for number, name in enumerate(classes)}


def _merged_parameter(model: Any, name: str, c: Tensor) -> Tensor:
    parent, _, part = name.rpartition(".")
    module = model.get_submodule(parent)
    base = getattr(module, part)
    merged = module.weighed[part].merged(base.float(), c).to(base.dtype)
    delattr(module, vectors_of(part))  # not needed again
    return merged


def _base_of(architecture: type[PreTrainedModel]) -> Any:
    """The class of transformers that one of ours is derived from."""
    return next(
        each for each in architecture.__mro__ if each.__module__.startswith("transformers.")
    )


def _stock_config(config: Any, base: Any) -> Any:
    """The configuration of the stock class `base`, with all values of ours that it knows."""
    ours = ("model_type", "architectures", "auto_map", "ensembling", "transformers_version")
    values = {name: value for name, value in config.to_dict().items() if name not in ours}
    return base.config_class(**values)
