"""What would work for models that `moe` refuses, in words for the refusal."""

from collections.abc import Mapping

from mergekit.common import ModelReference
from transformers import AutoModelForCausalLM, PretrainedConfig

from mergekit_moe_ext.merging.wrappers import is_mixture

_TOWER = (
    'CLIPVisionModelWithProjection.from_pretrained("{path}").save_pretrained("tower") saves its '
    "vision tower, which `merge_method: wemoe` takes"
)
_WITH_HEAD = (
    'AutoModelForCausalLM.from_pretrained("{path}").save_pretrained("model") saves it with its head'
)
_TRUNK = (
    'AutoModel.from_pretrained("{path}").save_pretrained("trunk") saves {path} without its head, '
    "as others here are"
)
_DECODER = (
    "`merge_method: seq_moe` takes nearly every decoder (whole models, routed per text), and "
    "`merge_method: wemoe` fine-tunes of one base (task vectors, weighed by routers)"
)


def what_would_work(configs: Mapping[ModelReference, PretrainedConfig]) -> str:
    """A sentence that names a method, or a conversion, for these models."""
    model, config = next(iter(configs.items()))
    architecture = (config.architectures or [""])[0]
    is_decoder = type(config) in AutoModelForCausalLM._model_mapping
    path = model.model.path
    if any(is_mixture(each) for each in configs.values()):
        return "`merge_method: caem` merges models that are mixtures already"
    if architecture == "CLIPModel":
        return _TOWER.format(path=path)
    model_types = {each.model_type for each in configs.values()}
    if len(model_types) == 1 and is_decoder:
        with_head = [other for other, each in configs.items() if _has_head(each)]
        trunks = [other for other, each in configs.items() if _is_trunk(each)]
        if with_head and trunks and len(with_head) + len(trunks) == len(configs):
            return _TRUNK.format(path=with_head[0].model.path)
    if len(model_types) > 1 and is_decoder:
        return "`merge_method: hetero_moe` takes decoders of several architectures"
    if is_decoder and _has_head(config):
        return _DECODER
    if is_decoder and _is_trunk(config):
        return _WITH_HEAD.format(path=path)
    return (
        "`merge_method: wemoe` takes fine-tunes of one base of nearly any class (task vectors, "
        "weighed by routers)"
    )


def _has_head(config: PretrainedConfig) -> bool:
    """Whether the config is of a decoder with its head, by the name of its class."""
    architecture = (config.architectures or [""])[0]
    return architecture.endswith(("CausalLM", "LMHeadModel"))


def _is_trunk(config: PretrainedConfig) -> bool:
    """Whether the config is of a decoder without a head, by the name of its class."""
    architecture = (config.architectures or [""])[0]
    return architecture.endswith("Model") and not _has_head(config)
