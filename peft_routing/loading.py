"""Finding a routed adapter's configuration and its base model, with errors for people."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from _mergekit_moe_ext_common.checkpoints import Stored, check_finite, check_regular, read_headers
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.loading import check_model, explained, load_config, load_model
from _mergekit_moe_ext_common.options import Reading
from peft_routing.config import RoutedLoraConfig
from peft_routing.expert import PREFIX, read_expert
from peft_routing.heads import shapes_of
from peft_routing.layer import RoutedLoraLayer

# The class that PEFT's adapters of a task are on, whatever the base model was saved as.
CLASSES: dict[Any, Any] = {
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
    "FEATURE_EXTRACTION": transformers.AutoModel,
}


def load_adapter_config(adapter: str) -> RoutedLoraConfig:
    """The configuration of a routed adapter. `UserError` if the directory holds none."""
    directory = Path(adapter)
    if not directory.exists():
        raise UserError(f"{adapter} does not exist: name a directory that `compose` wrote")
    if directory.is_dir():
        check_regular(directory)
    for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not (directory / name).is_file():
            raise UserError(f"{adapter} has no {name}: name a directory that `compose` wrote")
    with explained(f"cannot read {adapter}", adapter):
        config = RoutedLoraConfig.from_pretrained(adapter)
        if not isinstance(config, RoutedLoraConfig) or not config.is_composed:
            raise UserError(f"{adapter} holds no routed adapter; `peft-route compose` makes one")
    read_headers([directory / SAFETENSORS_WEIGHTS_NAME])
    return config


def base_of(base: str | None, config: RoutedLoraConfig, reading: Reading) -> tuple[str, Any]:
    """The name and configuration of `base`, or of the base model that the adapter names."""
    name = base or config.base_model_name_or_path
    if not name:
        raise UserError("the adapter does not say what its base model is: give --base")
    if not isinstance(name, str):
        raise UserError(
            f"the adapter says base_model_name_or_path: {name!r}, which is no name: give --base"
        )
    try:
        return name, load_config(name, reading)
    except UserError as error:
        if base or Path(name).expanduser().is_dir():
            raise
        raise UserError(
            f"the adapter names {name} as its base model, which is not found from here: give "
            f"--base ({error})"
        ) from error


def load_routed(
    adapter: str,
    config: RoutedLoraConfig,
    base: str,
    base_config: Any,
    reading: Reading,
    *,
    headers: Mapping[str, Stored] | None = None,
    is_trainable: bool = False,
) -> Any:
    """The base model with the adapter on it. `UserError` where they do not fit.

    `headers` are what `check_routed` has found, where it was called before.
    """
    model = load_model(
        base,
        base_config,
        reading,
        architecture=CLASSES.get(config.task_type),
        headers=headers,
        not_stored=_not_stored(config),
        dtype="auto",
    )
    return _put_on(model, adapter, config, base, is_trainable)


def check_routed(
    adapter: str, config: RoutedLoraConfig, base: str, base_config: Any, reading: Reading
) -> Mapping[str, Stored]:
    """The tensors that the base model's files hold, by name, without reading them.

    `UserError` where these, or those of the adapter, are not what they must be.
    """
    load_on_empty(adapter, config, base, base_config, reading)
    return check_model(
        base,
        base_config,
        reading,
        architecture=CLASSES.get(config.task_type),
        not_stored=_not_stored(config),
    )


def _not_stored(config: RoutedLoraConfig) -> Sequence[str]:
    """The modules that the base model's files need not hold: those that the adapter brings whole,
    and the pooler, which a language model's files lack.
    """
    if config.task_type == "FEATURE_EXTRACTION":
        return ["pooler"]
    return [] if config.head is None else list(config.modules_to_save or ())


def load_on_empty(
    adapter: str, config: RoutedLoraConfig, base: str, base_config: Any, reading: Reading
) -> Any:
    """The adapter on its base model's architecture, without the base's weights. `UserError` where
    they do not fit.

    From now on `base_config` says as many labels as the adapter's head has.
    """
    shapes = {}
    if config.head != "own":  # heads of any size go beside the base model's
        for name, stored in read_headers([Path(adapter) / SAFETENSORS_WEIGHTS_NAME]).items():
            shapes[name.removeprefix(PREFIX)] = stored.shape
    model = empty_with_head(base_config, reading, config.task_type, shapes)
    return _put_on(model, adapter, config, base, is_trainable=False)


def base_for_composing(
    base: str, base_config: Any, config: RoutedLoraConfig, reading: Reading
) -> nn.Module:
    """The model that a routed adapter of experts is composed on: its names and shapes, or the
    whole of it where its own head becomes the adapter's.

    It has the class, and the number of labels, that the experts were trained with.
    """
    if config.head is None:
        is_trunk = config.task_type == "FEATURE_EXTRACTION"
        return empty_model(base_config, reading, CLASSES[config.task_type] if is_trunk else None)
    architecture = CLASSES.get(config.task_type)
    if config.head == "new":
        return load_model(base, base_config, reading, architecture=architecture, dtype="auto")
    model = empty_model(base_config, reading, architecture)
    if config.head == "own":  # heads of any size go beside the base model's
        return model
    source = config.head if config.head in config.experts else config.names[0]
    shapes = shapes_of(read_expert(source, config.experts[source], model))
    return empty_with_head(base_config, reading, config.task_type, shapes)


def empty_with_head(
    base_config: Any, reading: Reading, task_type: Any, shapes: Mapping[str, Sequence[int]]
) -> nn.Module:
    """The architecture for a task on the meta device, with a head of as many labels as its tensors
    of these shapes have. `base_config` is changed to say so.
    """
    model = empty_model(base_config, reading, CLASSES.get(task_type))
    if task_type not in CLASSES:
        return model
    for name, tensor in model.state_dict().items():
        shape = shapes.get(name, tensor.shape)
        if tuple(shape) != tuple(tensor.shape) and tuple(shape[1:]) == tuple(tensor.shape[1:]):
            base_config.num_labels = shape[0]
            return empty_model(base_config, reading, CLASSES[task_type])
    return model


def _put_on(
    model: nn.Module, adapter: str, config: RoutedLoraConfig, base: str, is_trainable: bool
) -> Any:
    misfit = f"{adapter} does not fit {base}, a {type(model).__name__}"
    with explained(misfit, adapter):
        try:
            return PeftModel.from_pretrained(
                model, adapter, config=config, is_trainable=is_trainable
            )
        except UserError as error:
            raise UserError(f"{misfit}: {error.message}") from error


def check_adapter(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """`UserError` where a routed adapter's file lacks a tensor, has one for which there is no
    place, or holds NaN or infinity.

    `tensors` are what is to be loaded, by their names in the model. (Shapes are torch's to check.)
    """
    where = f"the routed adapter {adapter_name!r}"
    expected = _names_in(model, adapter_name)
    lacking = [name for name in expected if name not in tensors]
    if lacking:
        others = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
        raise UserError(
            f"the file of {where} lacks {lacking[0]}{others}: fetch it again, or compose it again "
            "(if it is of another adapter than the one loaded, give it a name of its own)"
        )
    known = model.state_dict().keys()
    surplus = [name for name in tensors if name not in known]
    if surplus:
        raise UserError(
            f"the file of {where} holds {surplus[0]}, for which there is no place by its "
            f"{CONFIG_NAME}: fetch both again"
        )
    check_finite(tensors, where)


def _names_in(model: nn.Module, adapter_name: str) -> list[str]:
    """Every tensor of a routed adapter, by its name in the model."""
    names = []
    for place, layer in model.named_modules():
        if not isinstance(layer, RoutedLoraLayer):
            continue
        for kind in (*layer.adapter_layer_names, *layer.other_param_names):
            of_adapters = getattr(layer, kind)
            if adapter_name in of_adapters:
                tensors = of_adapters[adapter_name].state_dict()
                names += [f"{place}.{kind}.{adapter_name}.{tensor}" for tensor in tensors]
    return names


def empty_model(config: Any, reading: Reading, auto_class: Any = None) -> nn.Module:
    """The architecture on the meta device: names and shapes without weights.

    It is that of the configuration, or what an Auto class makes of it.
    """
    name = config.name_or_path
    with explained(f"cannot build a model by the config of {name}", name), torch.device("meta"):
        if auto_class is not None:
            return auto_class.from_config(config, trust_remote_code=reading.trust_remote_code)
        architecture = getattr(transformers, (config.architectures or [""])[0], None)
        if architecture is not None:
            return architecture(config)
        auto = transformers.AutoModelForCausalLM
        return auto.from_config(config, trust_remote_code=reading.trust_remote_code)
