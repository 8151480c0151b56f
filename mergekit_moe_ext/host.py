"""The seam to mergekit: the names in `mergekit.merge` that are replaced, and their replacements.

Each replacement changes nothing for a stock method, but for what is said of a method that does not
exist, and for results that mergekit loses on several GPUs. For ours, `run_merge` checks everything
first, runs the stock `run_merge` into a staging directory, adds card, tokenizer and processor
files, and renames once. `get_architecture_info` gives the plan of a structural method, and to our
tensor methods a description of what mergekit has none of.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from mergekit_moe_ext.methods import METHODS

LOG = logging.getLogger(__name__)


def register_methods(registry: ModuleType) -> None:
    """Put our methods into `mergekit.merge_methods.registry`, once."""
    present = {method.spec.name for method in registry.registered_methods()}
    for method in METHODS:
        if method.spec.name not in present:
            registry.register(method)


def extend_merge_module(merge: Any) -> None:
    """Replace the four names in `mergekit.merge`, once."""
    from mergekit_moe_ext.merging.planner import MergePlanner
    from mergekit_moe_ext.merging.several_gpus import CollectingExecutor

    if merge.MergePlanner is MergePlanner:
        return
    merge.MergePlanner = MergePlanner
    merge.MultiGPUExecutor = CollectingExecutor
    merge.get_architecture_info = _planning_our_methods(merge.get_architecture_info)
    merge.run_merge = _staging_our_methods(merge.run_merge, merge)
    _explain_configurations(merge.MergeConfiguration)


def _explain_configurations(configuration: Any) -> None:
    """Make mergekit say what is wrong with configurations that it refuses in any case: those in the
    form of mergekit-moe, and those with the bare path of a model.
    """
    from _mergekit_moe_ext_common.errors import UserError
    from mergekit_moe_ext.merging.mergekit_moe import is_mergekit_moe

    stock = configuration.model_validate.__func__

    @functools.wraps(stock)
    def model_validate(cls: Any, document: Any, *arguments: Any, **keywords: Any) -> Any:
        if is_mergekit_moe(document):
            raise UserError(
                "this configuration has the form of mergekit-moe (`experts:` with "
                "`source_model:`): run it with `mergekit-moe`, or with `mergekit-moe-ext yaml`, "
                "which converts it to `merge_method: moe`"
            )
        models = document.get("models") if isinstance(document, dict) else None
        for index, model in enumerate(models if isinstance(models, list) else []):
            if isinstance(model, str):
                path = model.removeprefix("model").strip(": ")
                raise UserError(f"models[{index}] is {model!r}: write `- model: {path}`")
        return stock(cls, document, *arguments, **keywords)

    configuration.model_validate = classmethod(model_validate)


def _planning_our_methods(stock: Callable) -> Callable:
    from mergekit_moe_ext.merging.loras import without_loras
    from mergekit_moe_ext.merging.planner import (
        PREPARED,
        dense_architecture,
        prepare,
        structural_method,
    )
    from mergekit_moe_ext.merging.preflight import read_job, tensor_method

    @functools.wraps(stock)
    def get_architecture_info(config: Any, options: Any) -> Any:
        method = structural_method(config.merge_method)
        if method is None:
            if tensor_method(config.merge_method) is None:
                return stock(config, options)
            config = without_loras(config, options)
            return dense_architecture(stock, config, options)
        return PREPARED.get() or prepare(read_job(config, options, method))

    return get_architecture_info


def _staging_our_methods(stock: Callable, merge: Any) -> Callable:
    from mergekit_moe_ext.merging.planner import structural_method
    from mergekit_moe_ext.merging.preflight import tensor_method

    @functools.wraps(stock)
    def run_merge(
        merge_config: Any, out_path: str, options: Any, config_source: str | None = None
    ) -> None:
        name = merge_config.merge_method
        structural = structural_method(name)
        tensorwise = tensor_method(name) if structural is None else None
        if structural is not None:
            _merge_structure(
                stock, merge, structural, merge_config, out_path, options, config_source
            )
        elif tensorwise is not None:
            _merge_tensors(stock, tensorwise, merge_config, out_path, options, config_source)
        else:
            stock(merge_config, out_path, options, config_source)

    return run_merge


@contextmanager
def _own_loaders(directory: Path) -> Iterator[None]:
    """A context in which mergekit writes a merge to the directory; nothing of it goes on after."""
    from mergekit.io.tasks import LoaderCache

    from mergekit_moe_ext.merging.writer import stop_writing

    # mergekit keeps loaders for the life of the process, so a second merge would read stale
    # weights.
    LoaderCache.loaders.clear()
    try:
        yield
    finally:
        stop_writing(directory)
        LoaderCache.loaders.clear()


def _merge_structure(
    stock: Callable,
    merge: Any,
    method: Any,
    merge_config: Any,
    out_path: str,
    options: Any,
    config_source: str | None,
) -> None:
    """The stock `run_merge` by a structural method, checked and staged; `merge` is the module that
    it is of.
    """
    from _mergekit_moe_ext_common.staging import check_output, check_room, staged
    from mergekit_moe_ext.merging.card import write_card
    from mergekit_moe_ext.merging.foreign_code import check_settings
    from mergekit_moe_ext.merging.loras import merge_loras
    from mergekit_moe_ext.merging.outputs import complete_model
    from mergekit_moe_ext.merging.planner import PREPARED, prepare
    from mergekit_moe_ext.merging.preflight import check_document, read_job

    if config_source:
        check_document(yaml.safe_load(config_source))
    job = read_job(merge_config, options, method)
    out = check_output(out_path)
    prepared = prepare(job)
    donor = _folder_of(job.donor, job.merge_options)
    check_settings(donor, str(job.donor.model))
    check_room(out, prepared.plan.bytes)
    stock_config = job.config
    makes_tokenizer = bool(merge_config.tokenizer or merge_config.tokenizer_source)
    if not makes_tokenizer:  # then the template goes into the tokenizer that we copy
        stock_config = job.config.model_copy(update={"chat_template": None})
    with staged(out) as directory:
        if any(model.lora for model in job.sources):
            job = merge_loras(job, directory.with_name(f"{directory.name}.loras"))
            prepared = prepare(job)  # a LoRA may bring tensors of its own
        # We write the card and copy the tokenizer ourselves: stock asks the Hub about paths for the
        # one and takes the other from a model that it picks by chance where there is no base. And
        # it seeds nothing where no seed is given, while what we write names one.
        stock_options = job.merge_options.model_copy(
            update={"write_model_card": False, "copy_tokenizer": False, "random_seed": job.seed}
        )
        token = PREPARED.set(prepared)
        try:
            with _own_loaders(directory):
                stock(stock_config, str(directory), stock_options)
        finally:
            PREPARED.reset(token)
        if options.copy_tokenizer:
            config = prepared.plan.config
            _copy_tokenizer_files(
                merge, job, config, donor, directory, tokenizer_is_there=makes_tokenizer
            )
        if options.write_model_card:
            write_card(job, prepared.plan, directory, config_source or merge_config.to_yaml())
        complete_model(
            directory,
            prepared.plan.config,
            donor,
            str(job.donor.model),
            is_trusted=options.trust_remote_code,
        )


def _merge_tensors(
    stock: Callable,
    method: Any,
    merge_config: Any,
    out_path: str,
    options: Any,
    config_source: str | None,
) -> None:
    """The stock `run_merge` by a tensor method of ours, checked and staged."""
    from _mergekit_moe_ext_common.loading import explained
    from _mergekit_moe_ext_common.staging import check_output, copy_settings, staged
    from mergekit_moe_ext.merging.loras import merged_loras, merged_or_base
    from mergekit_moe_ext.merging.preflight import check_document, check_head, check_tensor_merge

    if config_source:
        check_document(yaml.safe_load(config_source))
    check_tensor_merge(merge_config, options, method)
    out = check_output(out_path)
    # What mergekit cannot merge makes it raise exceptions of many kinds.
    failure = f"{method.spec.name} cannot merge these models"
    models = sorted(merge_config.referenced_models(), key=str)
    donor = merge_config.base_model
    with explained(failure, str(merge_config.base_model)), staged(out) as directory:
        folder = _folder_of(donor, options)
        if not _wants_tokenizer(folder, donor.config(options.trust_remote_code)):
            options = options.model_copy(update={"copy_tokenizer": False})
        if any(model.lora for model in models):
            place = directory.with_name(f"{directory.name}.loras")
            _, options = merged_loras(models, options, place)
            for model in models:
                check_head(model, merged_or_base(model, options), merge_config, options)
        with _own_loaders(directory), _directories_are_no_models_on_the_hub():
            stock(merge_config, str(directory), options, config_source)
        copy_settings(folder, directory)


@contextmanager
def _directories_are_no_models_on_the_hub() -> Iterator[None]:
    """Keeps mergekit's card from asking the Hub for a model of a local directory's name, which
    fails without a network, at the end of the merge.
    """
    import mergekit.card

    stock = mergekit.card.is_hf
    mergekit.card.is_hf = lambda path: not Path(path).exists() and stock(path)
    try:
        yield
    finally:
        mergekit.card.is_hf = stock


def _folder_of(donor: Any, options: Any) -> Path:
    """The directory of the model that config and tokenizer come from; of a LoRA, of its base."""
    from _mergekit_moe_ext_common.staging import model_folder

    model = donor.model
    return model_folder(model.path, revision=model.revision, cache_dir=options.transformers_cache)


def _wants_tokenizer(folder: Path, config: Any) -> bool:
    """Whether the model in this directory has a tokenizer, or would have one if it were whole: one
    that reads images first may have none.
    """
    import transformers

    from mergekit_moe_ext.modeling import find_architecture

    if any(folder.glob("*token*")):
        return True
    name = (config.architectures or [""])[0]
    architecture = find_architecture(name) or getattr(transformers, name, None)
    return getattr(architecture, "main_input_name", "") != "pixel_values"


def _copy_tokenizer_files(
    merge: Any, job: Any, config: Any, donor: Path, directory: Path, *, tokenizer_is_there: bool
) -> None:
    from _mergekit_moe_ext_common.staging import copy_settings, copy_tokenizer, has_tokenizer
    from mergekit_moe_ext.merging.sources import tokenizer_of

    copy_settings(donor, directory)
    if tokenizer_is_there or not _wants_tokenizer(donor, config):
        return
    try:
        if job.config.chat_template:
            # mergekit loads the tokenizer, gives it the template and saves it.
            from_donor = job.config.model_copy(update={"base_model": job.donor})
            merge._copy_tokenizer(from_donor, str(directory), job.merge_options)
            return
        copy_tokenizer(donor, directory)
        if not has_tokenizer(directory):
            tokenizer_of(job.donor, job.merge_options).save_pretrained(directory)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        # ImportError: some tokenizers need libraries of their own.
        reason = str(error).strip().splitlines()[0].rstrip(": ")
        LOG.warning("the output has no tokenizer: %s", reason)
