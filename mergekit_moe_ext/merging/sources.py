"""The models that a merge reads: their configs, and the names, shapes and dtypes of their tensors.

Everything here reads headers only, and everything that can be wrong with a source is found here,
before any tensor is read.
"""

import functools
import logging
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mergekit.common import ModelPath, ModelReference
from mergekit.io.lazy_tensor_loader import ShardedTensorIndex
from mergekit.options import MergeOptions
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, PretrainedConfig
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
    no_weights,
    wrapper_of,
)
from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.manifest import Manifest
from mergekit_moe_ext.merging.method import Job

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
)
# Config keys that say how the tensors are used; where they differ, the output does as the donor
# does.
_BEHAVIOUR = (
    "rms_norm_eps",
    "rope_parameters",
    "sliding_window",
    # of mixtures of experts
    "num_experts_per_tok",
    "norm_topk_prob",
    "routed_scaling_factor",
    "scoring_func",
    "topk_method",
    "n_group",
    "topk_group",
    "expert_capacity",
)
# Recomputed by transformers; old checkpoints hold them all the same.
_NOT_PARAMETERS = ("rotary_emb.inv_freq", "embeddings.position_ids")
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
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# As safetensors and as torch name them.
DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclass(frozen=True)
class Headers:
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]  # as torch names them
    prefix: str = ""  # what the files have before every name, which is left out here

    @property
    def dtype(self) -> str:
        """The dtype of most of its tensors."""
        names = list(self.dtypes.values())
        return max(set(names), key=names.count)


def read_configs(job: Job) -> dict[ModelReference, PretrainedConfig]:
    """The config of every source, in the order of `job.sources`."""
    return {model: _config_of(model, job.merge_options) for model in job.sources}


def _config_of(model: ModelReference, options: MergeOptions) -> PretrainedConfig:
    for path in (model.model, model.lora):
        looks_local = path is not None and (
            path.path.startswith((".", "/", "~")) or path.path.count("/") > 1
        )
        if path is not None and looks_local and not Path(path.path).exists():
            raise UserError(f"{path.path} does not exist (named as {model} in the configuration)")
    if model.lora and not options.lora_merge_cache:
        raise UserError(
            f"{model} is a LoRA on a base model; name a directory for the merged model with "
            "--lora-merge-cache"
        )
    if (
        Path(model.model.path, "adapter_config.json").exists()
        and not Path(model.model.path, "config.json").exists()
    ):
        raise UserError(f"{model} is a LoRA; write its base model before it: BASE+{model}")
    try:
        config = model.config(trust_remote_code=options.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the config of {model}: {_first_line(error)}") from error
    except KeyError as error:
        raise UserError(f"the config of {model} lacks {error}") from error
    if getattr(config, "quantization_config", None):
        raise UserError(f"{model} is quantised; merge the weights that it was quantised from")
    return config


def tokenizer_of(model: ModelReference, options: MergeOptions) -> Any:
    """Whatever transformers raises where there is none that it can read."""
    return AutoTokenizer.from_pretrained(
        model.model.path,
        revision=model.model.revision,
        cache_dir=options.transformers_cache,
        trust_remote_code=options.trust_remote_code,
    )


def lacks_tokenizer(model: ModelReference) -> bool:
    """Whether a local model has none. transformers would make up an empty one for many
    architectures.
    """
    directory = Path(model.model.path)
    return directory.is_dir() and not any((directory / name).exists() for name in _TOKENIZER_FILES)


def names_of(models: list[ModelReference]) -> list[str]:
    """The last part of each path, numbered where that is not enough."""
    names = [Path(model.model.path).name for model in models]
    return [f"{name}-{i}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def check_same_size(job: Job, configs: Mapping[ModelReference, PretrainedConfig]) -> None:
    """All sources must have the sizes of the donor. `UserError` names the key that differs.

    Keys that change what a model computes, but not its sizes, are warned about.
    """
    keys = (*_SIZES, *(() if _vocabulary_may_differ(job) else ("vocab_size",)))
    wanted = configs[job.donor]
    for model, config in configs.items():
        for key in keys:
            here, there = getattr(config, key, None), getattr(wanted, key, None)
            if here != there:
                hint = (
                    "; `tokenizer: {source: union}` aligns vocabularies"
                    if key == "vocab_size"
                    else ""
                )
                raise UserError(
                    f"{model} has another size than {job.donor}: `{key}` is {here!r}, not "
                    f"{there!r}{hint}"
                )
        for key in _BEHAVIOUR:
            here, there = getattr(config, key, None), getattr(wanted, key, None)
            if here != there:
                LOG.warning(
                    "`%s` of %s is %s; the output has that of %s: %s",
                    key,
                    model,
                    here,
                    job.donor,
                    there,
                )


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
        merged = merged_lora(model, job.merge_options)
        is_merged = merged is not None and _is_whole(merged)
        stored = ModelReference(model=ModelPath(path=str(merged)) if is_merged else model.model)
        config = stored.config(job.merge_options.trust_remote_code) if is_merged else configs[model]
        wanted = manifests[model]
        headers[model] = _without_prefix(stored_headers(stored, job.merge_options), wanted.prefix)
        _check_headers(model, headers[model], config, wanted, vocabulary_may_differ)
        for name in wanted.tied & headers[model].shapes.keys():
            _check_really_tied(model, stored, name, wanted, job.merge_options)
    return headers


def output_dtype(job: Job, headers: Mapping[ModelReference, Headers]) -> torch.dtype:
    """What the configuration says, or else what holds the values of all sources."""
    return job.dtype or functools.reduce(
        torch.promote_types, [getattr(torch, source.dtype) for source in headers.values()]
    )


def _vocabulary_may_differ(job: Job) -> bool:
    options = (
        job.config.tokenizer,
        job.config.tokenizer_source,
        job.merge_options.unsafe_truncate_embeddings,
    )
    return any(options)


def _check_really_tied(
    model: ModelReference,
    stored: ModelReference,
    name: str,
    wanted: Manifest,
    options: MergeOptions,
) -> None:
    """A stored copy of a tied tensor is dropped only if it is one: transformers unties those that
    differ.
    """
    loader = stored.lazy_loader(
        cache_dir=options.transformers_cache, lazy_unpickle=options.lazy_unpickle
    )
    stored_names = loader.index.tensor_paths
    if wanted.embedding in stored_names and not torch.equal(
        loader.get_tensor(name), loader.get_tensor(wanted.embedding)
    ):
        raise UserError(
            f"{name} of {model} has no place in the output, which ties it to the embedding: the "
            "two differ"
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
    shapes, dtypes = {}, {}
    for shard in index.shards:
        check_shard_name(Path(index.base_path, SAFE_WEIGHTS_INDEX_NAME), shard.filename)
        path = Path(index.base_path, shard.filename)
        if not path.exists():
            raise UserError(f"{path} is missing, though the index of {model} names it")
        try:
            for name, shape, dtype in _shard_headers(index, path):
                shapes[name], dtypes[name] = shape, dtype
        except _UNREADABLE as error:
            raise UserError(damage(path, error)) from error
        lost = [name for name in shard.contained_keys if name not in shapes]
        if lost:
            raise UserError(f"{path} lacks {lost[0]}, though the index of {model} names it there")
    return Headers(shapes, dtypes)


def _why_unreadable(model: ModelReference, error: Exception) -> str:
    directory = Path(model.model.path)
    if not directory.is_dir():
        return _first_line(error)
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        if (directory / name).exists():
            return damage(directory / name, error)
    return no_weights(model.model.path)


def _without_prefix(headers: Headers, prefix: str) -> Headers:
    if not prefix or not any(name.startswith(prefix) for name in headers.shapes):
        return headers
    shapes = {name.removeprefix(prefix): shape for name, shape in headers.shapes.items()}
    return Headers(
        shapes, {name.removeprefix(prefix): dtype for name, dtype in headers.dtypes.items()}, prefix
    )


def _shard_headers(
    index: ShardedTensorIndex, path: Path
) -> Iterator[tuple[str, tuple[int, ...], str]]:
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
    wanted: Manifest,
    vocabulary_may_differ: bool,
) -> None:
    tied_here = (
        wanted.vocabulary | wanted.tied
        if getattr(config, "tie_word_embeddings", False)
        else frozenset()
    )
    for name, shape in wanted.shapes.items():
        if name not in headers.shapes:
            if name in tied_here and any(other in headers.shapes for other in tied_here):
                continue
            lacking = [each for each in wanted.shapes if each not in {*headers.shapes, *tied_here}]
            wrapper = wrapper_of(headers.shapes, lacking)
            hint = f": {wrapper}" if wrapper else ""
            raise UserError(f"{model} lacks the tensor {name}{hint}")
        skip = 1 if name in wanted.vocabulary and vocabulary_may_differ else 0
        if headers.shapes[name][skip:] != shape[skip:]:
            raise UserError(
                f"{name} of {model} has the shape {headers.shapes[name]}, but its architecture "
                f"wants {shape}"
            )
        if headers.dtypes[name] not in DTYPES.values():
            raise UserError(
                f"{name} of {model} is {headers.dtypes[name]}; only {', '.join(DTYPES.values())} "
                "can be merged"
            )
    for name in headers.shapes:
        if name in wanted.shapes or name in tied_here or name.endswith(_NOT_PARAMETERS):
            continue
        if any(
            re.search(pattern, name) for pattern in wanted.ignored
        ):  # prediction of further tokens, mostly
            LOG.warning("%s of %s is left out, as transformers does", name, model)
            continue
        hint = ": its embeddings are not tied, the output's are" if name in wanted.tied else ""
        raise UserError(f"{name} of {model} has no place in the output{hint}")


def merged_lora(model: ModelReference, options: MergeOptions) -> Path | None:
    """Where mergekit keeps the merged model of a LoRA source, whether it is there yet or not."""
    if not model.lora or not options.lora_merge_cache:
        return None
    return Path(options.lora_merge_cache, f"{model.model._unique_id()}_{model.lora._unique_id()}")


def merge_loras(job: Job) -> None:
    """Merge every LoRA source into mergekit's `--lora-merge-cache`, each whole or not at all.

    mergekit takes a directory that exists there for a finished one, so an interrupted merge would
    spoil the cache.
    """
    options = job.merge_options
    for model in job.sources:
        merged = merged_lora(model, options)
        if merged is None:
            continue
        if _is_whole(merged):
            continue
        shutil.rmtree(merged, ignore_errors=True)
        partial = merged.parent / f".partial-{os.getpid()}"
        try:
            model.merged(
                cache_dir=str(partial),
                trust_remote_code=options.trust_remote_code,
                lora_merge_dtype=options.lora_merge_dtype,
            )
            (partial / merged.name).rename(merged)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"cannot merge the LoRA {model.lora} into {model.model}: {_first_line(error)}"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _is_whole(merged: Path) -> bool:
    """mergekit, where it is interrupted, leaves a directory without weights."""
    return any(merged.glob("*.safetensors*"))


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in (str(error) or type(error).__name__).strip().splitlines()]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
