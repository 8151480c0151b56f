"""The models that a merge reads: their configs, and the names, shapes and dtypes of their tensors.

What can be wrong with a source is found here, from the headers of its files, before the merge reads
any tensor. Only tensors that may be tied are compared by their values.
"""

import copy
import functools
import inspect
import logging
import pickle
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelPath, ModelReference
from mergekit.io.lazy_tensor_loader import LazyTensorLoader, ShardedTensorIndex, ShardInfo
from mergekit.options import MergeOptions
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from _mergekit_moe_ext_common.checkpoints import (
    check_regular,
    check_shard_name,
    damage,
    first_line,
    no_weights,
    wrapper_of,
)
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.loading import existing, explained, read_tokenizer, read_values
from mergekit_moe_ext.merging.layouts import hub_layer
from mergekit_moe_ext.merging.manifest import NOT_PARAMETERS, Manifest
from mergekit_moe_ext.merging.method import Job
from mergekit_moe_ext.merging.views import Derivation, View, derived_shapes, seen_through, unchanged
from mergekit_moe_ext.merging.wrappers import language_config

LOG = logging.getLogger(__name__)
# Config keys that must agree for tensors of the sources to be merged with each other. The
# vocabulary is not among them: mergekit's `tokenizer:` aligns it.
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
)
# Config keys that say nothing of what a model computes from the tokens that it is given. Where any
# other differs, the output does as the donor does.
_WITHOUT_EFFECT = re.compile(
    # what it is called, how it was saved, and what else it can be asked for
    r"_.*|architectures|model_type|transformers_version|(torch_)?dtype|auto_map|use_cache"
    r"|output_(attentions|hidden_states|router_logits|scores|past)|return_dict|id2label|label2id"
    r"|num_labels|problem_type|finetuning_task|task_specific_params|chunk_size_feed_forward"
    # its tokens, which `tokenizer:` aligns; a head of its own, and the number of experts
    r"|vocab_size|.*token_(ids?|index)|tie_word_embeddings|(num|n|moe_num)_(.*_)?experts"
    # what matters in training alone
    r"|(?!token_).*(dropout|pdrop|layerdrop|drop_path|drop_rate).*|.*_drop|.*initializer.*|init_std"
    r"|initializ.*|.*aux_loss.*|.*z_loss.*|.*jitter.*|gradient_checkpointing|pretraining_tp"
)
# What a damaged index, safetensors file or pickle makes its reader raise.
_UNREADABLE = (
    EOFError,
    KeyError,
    OSError,
    RuntimeError,
    SafetensorError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)
# As safetensors and as torch name them.
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
StoredTensor = tuple[str, tuple[int, ...], str]  # its name, shape and dtype


@dataclass(frozen=True)
class Headers:
    """The shapes and dtypes of a checkpoint's tensors, by name.

    dtypes: by torch's names for them.
    prefix: a text that all names in the files begin with, and that is left out here.
    trunk: a text that all names here begin with, and that is left out in the files.
    view: what makes the tensors that the files hold in another form.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    prefix: str = ""
    trunk: str = ""
    view: View = ()

    @property
    def dtype(self) -> str:
        """The dtype of most of its tensors."""
        names = list(self.dtypes.values())
        return max(set(names), key=names.count)

    def seen_through(self, layer: tuple[Derivation, ...]) -> "Headers":
        """The headers with one more layer of a view on top."""
        if not layer:
            return self
        if self.prefix or self.trunk:
            return self._renamed().seen_through(layer)
        shapes = derived_shapes(self.shapes, layer)
        dtypes = {name: self.dtypes[name] for name in shapes if name in self.dtypes}
        for derivation in layer:
            dtypes |= dict.fromkeys(derivation.names, self.dtypes[derivation.origin])
        return replace(self, shapes=shapes, dtypes=dtypes, view=(*self.view, layer))

    def _renamed(self) -> "Headers":
        """The headers with a first layer of the view that gives the tensors their names here, for
        layers that stand on it.
        """
        renaming = []
        for name in self.shapes:
            stored = self.prefix + name.removeprefix(self.trunk)
            renaming.append(Derivation(stored, (name,), unchanged))
        return Headers(self.shapes, self.dtypes, view=(tuple(renaming),))


def read_configs(job: Job) -> dict[ModelReference, PretrainedConfig]:
    """The config of every source, in the order of `job.sources`."""
    return {model: config_of(stored_model(job, model), job.merge_options) for model in job.sources}


def check_source(model: ModelReference, options: MergeOptions) -> None:
    """`UserError` for a model, or a LoRA on one, that cannot be read."""
    config_of(model, options)
    stored_headers(ModelReference(model=model.model), options)


def stored_model(job: Job, model: ModelReference) -> ModelReference:
    """Where a source's files are; of a LoRA those of the merged model, once there is one."""
    if model in job.merged_loras:
        return ModelReference(model=ModelPath(path=str(job.merged_loras[model])))
    return model


def config_of(model: ModelReference, options: MergeOptions) -> PretrainedConfig:
    """The config of a model. `UserError` for a model, or a LoRA on one, that is not there or cannot
    be merged.
    """
    _check_paths(model)
    path = model.model.path
    with explained(f"cannot read the config of {model}", path), existing(path):
        read_values(path, model.model.revision)
        config = model.config(trust_remote_code=options.trust_remote_code)
    names = config.architectures or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f"the config of {model} says architectures: {names!r}, not a list of a class's name"
        )
    if getattr(config, "quantization_config", None):
        raise UserError(f"{model} is quantised; merge the weights that it was quantised from")
    return config


def _check_paths(model: ModelReference) -> None:
    """`UserError` for a path of this machine that leads nowhere, for a LoRA that is none, and for
    one in the place of a base model.
    """
    for path in (model.model, model.lora):
        if path is None:
            continue
        looks_local = path.path.startswith((".", "/", "~")) or path.path.count("/") > 1
        if looks_local and not Path(path.path).exists():
            raise UserError(f"{path.path} does not exist (named as {model} in the configuration)")
    if model.lora is not None:
        lora = Path(model.lora.path)
        if lora.is_dir() and not (lora / "adapter_config.json").exists():
            raise UserError(
                f"{model.lora} (named as {model}) is no LoRA: it has no adapter_config.json"
            )
    base = Path(model.model.path)
    if not base.is_dir() or (base / "config.json").exists():
        return
    if (base / "adapter_config.json").exists():
        raise UserError(f"{model} is a LoRA; write its base model before it: BASE+{model}")
    # A training leaves its checkpoints so, and the Hub's cache its snapshots.
    inside = [*sorted(base.glob("*/config.json")), *base.glob("snapshots/*/config.json")]
    hint = f"; {inside[-1].parent} has one" if inside else ""
    raise UserError(f"{model} has no config.json: it is not a model{hint}")


def tokenizer_of(model: ModelReference, options: MergeOptions) -> Any:
    """The tokenizer of a model. `NoTokenizerError` where it has none; another `UserError` where it
    cannot be read.
    """
    return read_tokenizer(
        model.model.path,
        str(model),
        revision=model.model.revision,
        cache_dir=options.transformers_cache,
        trust_remote_code=options.trust_remote_code,
    )


def names_of(models: list[ModelReference]) -> list[str]:
    """A name for each model: the last part of its path, numbered where several share that."""
    last_parts = [Path(model.model.path).name for model in models]
    names = []
    for index, name in enumerate(last_parts):
        names.append(f"{name}-{index}" if last_parts.count(name) > 1 else name)
    return names


def check_same_size(job: Job, configs: Mapping[ModelReference, PretrainedConfig]) -> None:
    """All sources must have the sizes of the donor. `UserError` names the key that differs."""
    keys = list(_SIZES)
    if not _vocabulary_may_differ(job):
        keys.append("vocab_size")
    donor_config = language_config(configs[job.donor])
    for model, whole in configs.items():
        config = language_config(whole)
        for key in keys:
            here = _size(config, key)
            there = _size(donor_config, key)
            if here != there:
                hint = ""
                if key == "vocab_size":
                    hint = "; `tokenizer: {source: union}` aligns vocabularies"
                raise UserError(
                    f"{model} has another size than {job.donor}: `{key}` is {here!r}, not "
                    f"{there!r}{hint}"
                )


def warn_of_other_behaviour(job: Job, configs: Mapping[ModelReference, PretrainedConfig]) -> None:
    """Warn of each key that lets a source compute something else than the donor, which is what the
    output does.
    """
    of_donor = _behaviour(configs[job.donor])
    for model, config in configs.items():
        of_model = _behaviour(config)
        for key in sorted(of_model.keys() | of_donor.keys()):
            here = of_model.get(key)
            there = of_donor.get(key)
            # Architectures that are like each other leave out what they do not have.
            if here != there and (here or there):
                LOG.warning(
                    "`%s` of %s is %s; the output has that of %s: %s",
                    key,
                    model,
                    here,
                    job.donor,
                    there,
                )


def _behaviour(config: PretrainedConfig) -> dict[str, Any]:
    """What a config and those inside it say of what the model computes, by key; inner keys have the
    outer one before them.
    """
    # What the class declares: a file may have further keys, of earlier versions and of other
    # libraries, which nothing reads.
    behaviour = {}
    for key in inspect.signature(type(config)).parameters:
        value = getattr(config, key, None)
        if isinstance(value, PretrainedConfig):
            for inner_key, inner_value in _behaviour(value).items():
                behaviour[f"{key}.{inner_key}"] = inner_value
        elif key not in _SIZES and not _WITHOUT_EFFECT.fullmatch(key):
            behaviour[key] = value
    return behaviour


def _size(config: PretrainedConfig, key: str) -> Any:
    """What a config says under a key of `_SIZES`, or implies by leaving it out."""
    value = getattr(config, key, None)
    if key in ("attention_bias", "mlp_bias"):
        return bool(value)
    heads = getattr(config, "num_attention_heads", None)
    width = getattr(config, "hidden_size", None)
    # Swin has a list of heads and MobileViT one of widths, one for each stage: nothing is implied.
    if value is not None or not isinstance(heads, int) or not isinstance(width, int):
        return value
    if key == "head_dim":
        return width // heads
    if key == "num_key_value_heads":
        return heads
    return value


def untied_if_any_is(
    job: Job, configs: Mapping[ModelReference, PretrainedConfig]
) -> PretrainedConfig:
    """The donor's config, or one like it that does not tie the head to the embedding, where a
    source has a head of its own. Tied sources then give their embedding for the head.
    """
    donor = configs[job.donor]
    if donor.is_encoder_decoder or not getattr(donor, "tie_word_embeddings", False):
        return donor
    untied = []
    for model, config in configs.items():
        if not getattr(config, "tie_word_embeddings", False):
            untied.append(model)
    if not untied:
        return donor
    LOG.warning(
        "%s has a head of its own, and %s ties its head to its embedding: the output's are apart",
        untied[0],
        job.donor,
    )
    config = copy.deepcopy(donor)
    config.tie_word_embeddings = False
    return config


def read_headers(
    job: Job,
    configs: Mapping[ModelReference, PretrainedConfig],
    manifests: Mapping[ModelReference, Manifest],
) -> dict[ModelReference, Headers]:
    """The headers of every source, checked against what it must hold.

    Of a LoRA source the headers are those of the merged model once `merge_loras` has made it, and
    those of the model beneath it before.
    """
    vocabulary_may_differ = _vocabulary_may_differ(job)
    headers = {}
    for model in job.sources:
        stored = ModelReference(model=stored_model(job, model).model)
        config = configs[model]
        manifest = manifests[model]
        in_files = _without_prefix(stored_headers(stored, job.merge_options), manifest.prefix)
        in_files = _with_trunk(in_files, manifest.trunk)
        headers[model] = in_files.seen_through(hub_layer(config, in_files.shapes, manifest.shapes))
        _check_headers(model, headers[model], config, manifest, vocabulary_may_differ)
        for name, other in manifest.tied.items():
            if {name, other} <= headers[model].shapes.keys():
                _check_really_tied(job, model, headers[model], name, other)
    return headers


def views_of(headers: Mapping[ModelReference, Headers]) -> dict[ModelReference, View]:
    """The view of every source, for the plan."""
    return {model: source.view for model, source in headers.items()}


def loader_of(job: Job, model: ModelReference, view: View) -> LazyTensorLoader:
    """A loader of a source's tensors, as its view shows them, for what is read before the merge."""
    options = job.merge_options
    stored = ModelReference(model=stored_model(job, model).model)
    loader = stored.lazy_loader(
        cache_dir=options.transformers_cache, lazy_unpickle=options.lazy_unpickle
    )
    return seen_through(loader, view)


def output_dtype(job: Job, headers: Mapping[ModelReference, Headers]) -> torch.dtype:
    """What the configuration says, or else what holds the values of all sources.

    Where the configuration says nothing, tensors of another dtype are warned about.
    """
    if job.dtype is not None:
        return job.dtype
    names = {str(model): source.dtype for model, source in headers.items()}
    dtype = functools.reduce(torch.promote_types, [getattr(torch, name) for name in names.values()])
    in_words = str(dtype).removeprefix("torch.")
    if len(set(names.values())) > 1:
        listed = ", ".join(f"{model} is {name}" for model, name in names.items())
        LOG.warning(
            "the sources are of different dtypes (%s), so the output is %s; `dtype:` in the "
            "configuration chooses another",
            listed,
            in_words,
        )
    elif dtype.itemsize < torch.float32.itemsize:
        for model, source in headers.items():
            others = [name for name, of_tensor in source.dtypes.items() if of_tensor != in_words]
            if others:
                LOG.warning(
                    "%d tensors of %s are not %s like the rest (%s, for one), and stay as they are "
                    "in the output; `dtype:` in the configuration casts them",
                    len(others),
                    model,
                    in_words,
                    others[0],
                )
    return dtype


def _vocabulary_may_differ(job: Job) -> bool:
    options = (
        job.config.tokenizer,
        job.config.tokenizer_source,
        job.merge_options.unsafe_truncate_embeddings,
    )
    return any(options)


def _check_really_tied(
    job: Job, model: ModelReference, headers: Headers, name: str, other: str
) -> None:
    """A stored copy of a tied tensor is dropped only if it is one: transformers unties those that
    differ.
    """
    loader = loader_of(job, model, headers.view)
    if not torch.equal(loader.get_tensor(name), loader.get_tensor(other)):
        raise UserError(
            f"{name} of {model} differs from {other}, to which its config ties it: remove it, or "
            "write `tie_word_embeddings: false` into its config.json if a head of its own is meant"
        )


def stored_headers(model: ModelReference, options: MergeOptions) -> Headers:
    """What is in the files of a checkpoint. `UserError` for one that is missing, damaged or
    incomplete.
    """
    directory = Path(model.model.path)
    if directory.is_dir():
        check_regular(directory)
    try:
        index = model.tensor_index(cache_dir=options.transformers_cache)
    except _UNREADABLE as error:
        reason = _why_unreadable(model, error)
        raise UserError(f"cannot read the weights of {model}: {reason}") from error
    shapes = {}
    dtypes = {}
    for shard in index.shards:
        for name, shape, dtype in _read_shard(model, index, shard):
            shapes[name] = shape
            dtypes[name] = dtype
    return Headers(shapes, dtypes)


def _read_shard(
    model: ModelReference, index: ShardedTensorIndex, shard: ShardInfo
) -> list[StoredTensor]:
    """What is in one file of a checkpoint. `UserError` where that is not what the index says."""
    check_shard_name(Path(index.base_path, SAFE_WEIGHTS_INDEX_NAME), shard.filename)
    path = Path(index.base_path, shard.filename)
    if not path.exists():
        raise UserError(f"{path} is missing, though the index of {model} names it")
    try:
        stored = list(_shard_headers(index, path))
    except _UNREADABLE as error:
        raise UserError(damage(path, error)) from error
    names = [name for name, _, _ in stored]
    for name in names:
        if name not in index.tensor_paths and not name.endswith(NOT_PARAMETERS):
            raise UserError(f"{path} holds {name}, which the index of {model} does not name")
    lost = set(shard.contained_keys).difference(names)
    for name in shard.contained_keys:
        if name in lost:
            raise UserError(f"{path} lacks {name}, though the index of {model} names it there")
    return stored


def _why_unreadable(model: ModelReference, error: Exception) -> str:
    directory = Path(model.model.path)
    if not directory.is_dir():
        return first_line(error)
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        if (directory / name).exists():
            return damage(directory / name, error)
    return no_weights(model.model.path)


def _without_prefix(headers: Headers, prefix: str) -> Headers:
    """The headers of a part of a larger model (one of CLIP's towers) by the part's own names."""
    if not prefix or not any(name.startswith(prefix) for name in headers.shapes):
        return headers
    shapes = {name.removeprefix(prefix): shape for name, shape in headers.shapes.items()}
    dtypes = {name.removeprefix(prefix): dtype for name, dtype in headers.dtypes.items()}
    return replace(headers, shapes=shapes, dtypes=dtypes, prefix=prefix)


def _with_trunk(headers: Headers, trunk: str) -> Headers:
    """The headers of a trunk alone, by the names that its tensors have in the whole model."""
    if not trunk or any(name.startswith(trunk) for name in headers.shapes):
        return headers
    shapes = {trunk + name: shape for name, shape in headers.shapes.items()}
    dtypes = {trunk + name: dtype for name, dtype in headers.dtypes.items()}
    return replace(headers, shapes=shapes, dtypes=dtypes, trunk=trunk)


def _shard_headers(index: ShardedTensorIndex, path: Path) -> Iterator[StoredTensor]:
    if index.is_safetensors:
        with safe_open(path, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dictionary)
                view = shard.get_slice(name)
                yield name, tuple(view.get_shape()), DTYPES.get(view.get_dtype(), view.get_dtype())
    else:
        tensors = torch.load(path, map_location="meta", weights_only=True)
        for name, tensor in tensors.items():
            yield name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")


def _check_headers(
    model: ModelReference,
    headers: Headers,
    config: PretrainedConfig,
    manifest: Manifest,
    vocabulary_may_differ: bool,
) -> None:
    """`UserError` where a source lacks what its architecture has, holds it in another form, or
    holds what has no place in the output.
    """
    tied_here: Collection[str] = frozenset()
    if getattr(config, "tie_word_embeddings", False):
        tied_here = manifest.vocabulary | manifest.tied.keys()
    for name, shape in manifest.shapes.items():
        if name in headers.shapes:
            axis = manifest.token_axes.get(name) if vocabulary_may_differ else None
            _check_form(model, headers, name, shape, axis)
        elif not _is_tied_to_stored(name, headers, manifest, tied_here):
            there = {*headers.shapes, *tied_here}
            lacking = [each for each in manifest.shapes if each not in there]
            wrapper = wrapper_of(headers.shapes, lacking)
            hint = f": {wrapper}" if wrapper else ""
            raise UserError(f"{model} lacks the tensor {name}{hint}")
    for name in headers.shapes:
        if name in manifest.shapes or name in tied_here or manifest.is_computed(name):
            continue
        if manifest.is_ignored(name):  # prediction of further tokens, mostly
            LOG.warning("%s of %s is left out, as transformers does", name, model)
            continue
        hint = ": its embeddings are not tied, the output's are" if name in manifest.tied else ""
        raise UserError(f"{name} of {model} has no place in the output{hint}")


def _check_form(
    model: ModelReference, headers: Headers, name: str, shape: tuple[int, ...], axis: int | None
) -> None:
    """`UserError` for a tensor of another shape, in which one axis may differ, or of a dtype that
    is not merged.
    """
    if _without_axis(headers.shapes[name], axis) != _without_axis(shape, axis):
        raise UserError(
            f"{name} of {model} has the shape {headers.shapes[name]}, but its architecture "
            f"wants {shape}"
        )
    if headers.dtypes[name] not in DTYPES.values():
        raise UserError(
            f"{name} of {model} is {headers.dtypes[name]}; only {', '.join(DTYPES.values())} "
            "can be merged"
        )


def _is_tied_to_stored(
    name: str, headers: Headers, manifest: Manifest, tied_here: Collection[str]
) -> bool:
    """Whether the files hold a tensor that this one, which they lack, is tied to.

    `tied_here` are the names that the source's config ties; none where it ties nothing.
    """
    if name in tied_here and any(other in headers.shapes for other in tied_here):
        return True
    return bool(tied_here) and manifest.untied.get(name) in headers.shapes


def _without_axis(shape: tuple[int, ...], axis: int | None) -> tuple[int, ...]:
    return tuple(size for index, size in enumerate(shape) if index != axis)
