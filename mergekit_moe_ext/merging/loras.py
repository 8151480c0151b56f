"""Sources that are a LoRA on a base model (`base+lora`): merged before anything else, and kept if
the user names a directory for that (`--lora-merge-cache`).

mergekit takes a merged model from `<cache>/<base>_<lora>`, a name made of two paths, whatever lies
at these paths now. So every merge gets a directory of its own for these names, with links to where
the merged models are: in the user's cache, under a name made of what the files of base and LoRA
hold, or in that directory itself.
"""

import hashlib
import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
from filelock import FileLock
from huggingface_hub import snapshot_download
from mergekit.common import ModelPath, ModelReference, dtype_from_name, get_auto_cls
from mergekit.config import InputModelDefinition, MergeConfiguration
from mergekit.options import MergeOptions
from peft.utils.save_and_load import load_peft_weights
from torch import equal, nn
from transformers import PreTrainedModel

from _mergekit_moe_ext_common.checkpoints import first_line
from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.manifest import embedding_and_head
from mergekit_moe_ext.merging.method import Job
from mergekit_moe_ext.merging.sources import stored_headers

LOG = logging.getLogger(__name__)
_PARTIAL = ".partial-"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")


def merge_loras(job: Job, directory: Path) -> Job:
    """The job with every LoRA source merged into its base; see `merged_loras`."""
    merged, options = merged_loras(job.sources, job.merge_options, directory)
    return replace(job, merge_options=options, merged_loras=merged)


def merged_loras(
    models: Iterable[ModelReference], options: MergeOptions, directory: Path
) -> tuple[dict[ModelReference, Path], MergeOptions]:
    """Where each LoRA among the models lies, merged into its base, and options by which mergekit
    finds them in `directory`. `UserError` for a LoRA that does not fit its base.

    Merged models come from the user's `--lora-merge-cache` where they are in it, and go there else.
    Without one they lie in `directory`, which the caller removes.
    """
    directory.mkdir()
    merged = {}
    for model in models:
        if model.lora is None:
            continue
        place = directory / _name_of_merged(model)
        if options.lora_merge_cache:
            cached = _from_cache(model, options, Path(options.lora_merge_cache))
            place.symlink_to(cached.resolve(), target_is_directory=True)
        else:
            _merge(model, place, options)
        merged[model] = place
    return merged, options.model_copy(update={"lora_merge_cache": str(directory)})


def merged_or_base(model: ModelReference, options: MergeOptions) -> ModelReference:
    """Where the files of a model are; of a LoRA those that `merged_loras` made, whose options these
    are.
    """
    if model.lora is None or options.lora_merge_cache is None:
        return model
    merged = Path(options.lora_merge_cache, _name_of_merged(model))
    return ModelReference(model=ModelPath(path=str(merged)))


def without_loras(config: MergeConfiguration, options: MergeOptions) -> MergeConfiguration:
    """A configuration of the same models, with what `merged_loras` made in place of each LoRA.

    mergekit infers from it the tensors of a family that it has no list of, and it does not look for
    merged models there.
    """
    models = []
    for model in sorted(config.referenced_models(), key=str):
        models.append(InputModelDefinition(model=merged_or_base(model, options)))
    base = config.base_model and merged_or_base(config.base_model, options)
    return MergeConfiguration(merge_method=config.merge_method, models=models, base_model=base)


def _name_of_merged(model: ModelReference) -> str:
    """The name of the directory in which mergekit looks for a LoRA that is merged."""
    assert model.lora is not None
    return f"{model.model._unique_id()}_{model.lora._unique_id()}"


def _from_cache(model: ModelReference, options: MergeOptions, cache: Path) -> Path:
    """The directory of the merged model in the cache, made if it is not there yet."""
    assert model.lora is not None
    names = f"{Path(model.model.path).name}_{Path(model.lora.path).name}"
    entry = cache / f"{names}_{_content_key(model, options)[:16]}"
    with _locked(cache):
        if _is_whole(entry, options):
            return entry
        shutil.rmtree(entry, ignore_errors=True)
        partial = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=cache))
        try:
            _merge(model, partial / entry.name, options)
            (partial / entry.name).rename(entry)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return entry


@contextmanager
def _locked(cache: Path) -> Iterator[None]:
    """A context in which no other merge writes into the cache, and no half of a copy is in it."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache / ".lock")
        lock.acquire()
    except OSError as error:
        raise UserError(f"--lora-merge-cache: cannot write {cache}: {error}") from error
    try:
        # Whoever wrote there held the lock, so that it was killed.
        for stale in cache.glob(f"{_PARTIAL}*"):
            shutil.rmtree(stale, ignore_errors=True)
        yield
    finally:
        lock.release()


def _is_whole(entry: Path, options: MergeOptions) -> bool:
    """Whether the files of an entry are all there and can be read."""
    if not (entry / "config.json").exists():
        return False
    try:
        stored_headers(ModelReference(model=ModelPath(path=str(entry))), options)
    except UserError as error:
        LOG.warning("%s is damaged and is made again: %s", entry, error.message)
        return False
    return True


def _content_key(model: ModelReference, options: MergeOptions) -> str:
    """The sha256 of everything that a merged model depends on.

    That is what the files of base and LoRA hold, the dtype of the merge and PEFT's version.
    """
    assert model.lora is not None
    base = Path(ModelReference(model=model.model).local_path(options.transformers_cache))
    of_base: list[Path] = [base / "config.json"]
    for pattern in _WEIGHTS:
        of_base += sorted(base.glob(pattern))
    lora = _local_adapter(model.lora, options)
    of_lora = [lora / name for name in _ADAPTER_FILES if (lora / name).exists()]
    parts = [options.lora_merge_dtype, peft.__version__, _hashes(of_base), _hashes(of_lora)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _local_adapter(lora: ModelPath, options: MergeOptions) -> Path:
    if Path(lora.path).is_dir():
        return Path(lora.path)
    downloaded = snapshot_download(
        lora.path,
        revision=lora.revision,
        cache_dir=options.transformers_cache,
        allow_patterns=list(_ADAPTER_FILES),
    )
    return Path(downloaded)


def _hashes(files: Iterable[Path]) -> dict[str, str]:
    """The sha256 of each file's content, by its name."""
    hashes = {}
    for path in files:
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _merge(model: ModelReference, directory: Path, options: MergeOptions) -> None:
    """Write base and LoRA as one model into `directory`."""
    assert model.lora is not None
    try:
        config = model.config(options.trust_remote_code)
        base = get_auto_cls(config.architectures[0]).from_pretrained(
            model.model.path,
            revision=model.model.revision,
            cache_dir=options.transformers_cache,
            dtype=dtype_from_name(options.lora_merge_dtype) or "auto",
            trust_remote_code=options.trust_remote_code,
        )
        _check_vocabulary(model, base, options)
        merged = _merged(model, base, options)
        merged.save_pretrained(directory)
    except (OSError, RuntimeError, ValueError, UserWarning) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"cannot merge the LoRA {model.lora} into {model.model}: {first_line(error)}"
        ) from error


def _check_vocabulary(model: ModelReference, base: PreTrainedModel, options: MergeOptions) -> None:
    """`UserError` where the LoRA holds an embedding or a head of more tokens than the base has."""
    assert model.lora is not None
    weights = load_peft_weights(str(_local_adapter(model.lora, options)), device="cpu")
    ends = embedding_and_head(base)
    layers = {id(layer.weight): layer for layer in ends if hasattr(layer, "weight")}
    if not layers:  # a model of images has no tokens
        return
    names = [name for name, module in base.named_modules() if module in layers.values()]
    size = base.get_input_embeddings().weight.shape[0]
    for key, tensor in weights.items():
        inner = key.removeprefix("base_model.model.").replace(".base_layer", "")
        if inner.removesuffix(".weight") in names and len(tensor) != size:
            raise UserError(
                f"the LoRA {model.lora} was trained on a vocabulary of {len(tensor)} tokens, and "
                f"{model.model} has {size}: resize the base "
                f"(model.resize_token_embeddings({len(tensor)})), save it with the LoRA's "
                "tokenizer, and name that instead"
            )


def _merged(model: ModelReference, base: PreTrainedModel, options: MergeOptions) -> Any:
    """The base with the LoRA's update in its weights.

    A base that ties its head to its embedding is untied if the LoRA changes one of them alone:
    PEFT computes with the changed one in its own place only.
    """
    assert model.lora is not None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="Model with `tie_word_embeddings=True`")
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        # PEFT leaves what a file lacks at what it starts with, and says so in a warning alone.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        adapted = peft.PeftModel.from_pretrained(
            base, model.lora.path, revision=model.lora.revision, is_trainable=False
        )
        if not hasattr(adapted, "merge_and_unload"):
            kind = adapted.active_peft_config.peft_type.value
            raise UserError(f"{model.lora} is of type {kind}, which cannot be merged into weights")
        is_untied = _untie(base)
        if is_untied and base.config.is_encoder_decoder:
            raise UserError(
                f"the LoRA {model.lora} changes the head or the embedding of {model.model}, which "
                "are one tensor there, and an encoder-decoder cannot be untied here: merge it with "
                "PEFT, and name the result"
            )
        merged = adapted.merge_and_unload()
    if is_untied:
        embedding, head = embedding_and_head(merged)
        # A LoRA with `ensure_weight_tying` changes both alike.
        merged.config.tie_word_embeddings = equal(embedding.weight, head.weight)
        merged.tie_weights()
    return merged


def _untie(base: PreTrainedModel) -> bool:
    """Give head and embedding a weight each, if they share one and an adapter changes it.

    base: a model into which PEFT has put an adapter. Returns whether it was done.
    """
    ends = embedding_and_head(base)
    if len(ends) < 2 or ends[0].weight is not ends[1].weight:
        return False
    if not any(hasattr(layer, "base_layer") for layer in ends):
        return False
    head = ends[1]
    while hasattr(head, "base_layer"):
        head = head.base_layer
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    if getattr(head, "bias", None) is not None:  # BERT's is tied to one beside the head
        head.bias = nn.Parameter(head.bias.detach().clone(), requires_grad=False)
    return True
