"""What a config tells: whether its model is a mixture, and where in it the language model is."""

import logging
from collections.abc import Mapping

from transformers import PretrainedConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from mergekit_moe_ext.merging.manifest import hub_state
from mergekit_moe_ext.merging.method import CopiedTensor, Job

LOG = logging.getLogger(__name__)

# Where configs say how many experts there are.
NUMBERS_OF_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def language_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the language model in a multimodal one; of any other model its own."""
    inner = getattr(config, "text_config", None)
    return inner if isinstance(inner, PretrainedConfig) else config


def vocabulary_key(config: PretrainedConfig) -> str:
    """The key under which a config has its number of tokens, with a dot where it lies within that
    of the language model.

    mergekit's lists of Qwen2-VL and others name the outer one, which transformers does not read.
    """
    return "vocab_size" if language_config(config) is config else "text_config.vocab_size"


def routing_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config that says how many experts there are: of a generic mixture its own, of any other
    that of its language model.
    """
    return config if hasattr(config, "routed_ffns") else language_config(config)


def is_mixture(config: PretrainedConfig) -> bool:
    """Whether the config names a number of experts above one."""
    inner = routing_config(config)
    for key in NUMBERS_OF_EXPERTS:
        number = getattr(inner, key, None)
        if isinstance(number, int) and number > 1:
            return True
    return False


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """The language model in a multimodal one, with its head if that is a part of it; any other
    model itself.
    """
    inner = language_config(model.config)
    for module in model.modules():
        # The config that the language model was built with tells it from the other parts.
        if isinstance(module, PreTrainedModel) and module.config is inner:
            return module
    return model


def outside_language_model(config: PretrainedConfig) -> frozenset[str]:
    """The hub names of all tensors of a multimodal model that are not of its language model.

    They are none of a model that is nothing but a language model.
    """
    if language_config(config) is config:
        return frozenset()
    model, _ = hub_state(config)
    inside = {id(each) for each in language_model(model).state_dict(keep_vars=True).values()}
    head = model.get_output_embeddings()
    if head is not None:
        inside |= {id(parameter) for parameter in head.parameters()}
    outside: set[str] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in inside:
            outside |= revert_weight_conversion(model, {name: tensor}).keys()
    return frozenset(outside)


def copied_outside(
    job: Job, config: PretrainedConfig, stored: Mapping[str, tuple[int, ...]]
) -> dict[str, CopiedTensor]:
    """The donor's tensors that are not of its language model, as they are: none of a model that is
    nothing else.

    config, stored: the donor's config, and the shapes of the tensors in its files, by name.
    """
    names = outside_language_model(config) & stored.keys()
    if names:
        LOG.warning(
            "%d tensors outside the language model (%s, for one) are not merged: the output has "
            "those of %s",
            len(names),
            min(names),
            job.donor,
        )
    return {name: CopiedTensor(job.donor, name, stored[name]) for name in sorted(names)}
