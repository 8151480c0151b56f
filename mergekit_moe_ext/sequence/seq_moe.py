"""The method `seq_moe`: dense models of one architecture become a mixture of whole decoders, routed
per sequence (MergeME 3.1.3).

Every source is an expert with its own stack of decoder layers (`attention: separate`), or with its
own FFNs alone (`attention: merged`). The parameters that experts share are merged by the tensor
method that `shared:` names, and stored once.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mergekit.common import ModelReference
from pydantic import Field

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.layers import attention_and_ffn
from mergekit_moe_ext.merging.manifest import SharedTensor
from mergekit_moe_ext.merging.method import CopiedTensor, Job, Plan, StructuralMethod
from mergekit_moe_ext.merging.sources import (
    Headers,
    check_same_size,
    output_dtype,
    read_configs,
    read_headers,
    views_of,
    warn_of_other_behaviour,
)
from mergekit_moe_ext.sequence.decoders import Decoder, read_decoders
from mergekit_moe_ext.sequence.options import (
    MERGEME,
    SequenceOptions,
    learned_router,
    sequence_config,
    untrained_router,
)


class SeqMoeOptions(SequenceOptions):
    routing: Literal["perplexity", "task_vector", "learned", "uniform"] = Field(
        "perplexity",
        description="rule that chooses the experts of a sequence; a learned router has to be "
        "trained",
    )
    attention: Literal["separate", "merged"] = Field(
        "separate",
        description="attention of the experts: separate, with whole decoder layers of their own, "
        "or merged, with FFNs of their own alone",
    )
    mix: Literal["ffn", "output"] = Field(
        "output",
        description="outputs of the chosen experts that are added up: those of the whole experts, "
        "or, with attention: merged, those of each layer's FFN, in one pass (ffn)",
    )
    embedding: Literal["merged", "separate"] = Field(
        "merged",
        description="embedding, last norm and head of the experts: merged and shared, or separate",
    )
    shared: str = Field(
        "linear", description="tensor method that merges the parameters that experts share"
    )
    task_vector_layers: list[int] | None = Field(
        None,
        description="numbers of the decoder layers that routing: task_vector compares "
        "[default: all]",
    )


class SeqMoe(StructuralMethod):
    options_type = SeqMoeOptions

    def shared_method_name(self, options: Any) -> str:
        return options.shared

    def plan(self, job: Job) -> Plan:
        options = job.options
        if job.merge_options.unsafe_truncate_embeddings:
            raise UserError(
                "seq_moe does not truncate embeddings; align vocabularies with `tokenizer:`"
            )
        configs = read_configs(job)
        decoders = read_decoders(configs)
        _check_one_architecture(job, decoders)
        check_same_size(job, configs)
        if job.options.mix == "ffn":  # else each expert runs by its own config
            warn_of_other_behaviour(job, configs)
        donor = decoders[job.donor]
        manifests = {model: decoder.manifest for model, decoder in decoders.items()}
        headers = read_headers(job, configs, manifests)
        # A head that experts share is tied only if every source ties its own.
        is_tied = all(decoder.is_tied for decoder in decoders.values())
        base = _base_expert(job)
        _check_task_vector_layers(options, donor.config.num_hidden_layers)
        patterns = _shared_patterns(donor, options)
        if options.embedding == "separate" and (
            job.config.tokenizer or job.config.tokenizer_source
        ):
            raise UserError(
                "embedding: separate keeps every expert's vocabulary: leave `tokenizer` out"
            )
        config = sequence_config(
            job,
            donor.config,
            [decoders[model] for model in job.experts],
            embedding="shared" if options.embedding == "merged" else "separate",
            base_expert=base,
            hidden_size=donor.widths[0],
            tie_word_embeddings=options.embedding == "merged" and is_tied,
            head_bias="bias" in donor.head,
            shared_parameters=patterns,
            mixed_ffns=_mixed_ffns(donor, options),
            task_vector_layers=options.task_vector_layers,
        )
        dtype = output_dtype(job, headers)
        config.dtype = dtype
        copies, shared = _trunks(job, donor, headers, patterns)
        if options.embedding == "merged":
            shared |= _merged_ends(decoders, donor, is_tied, config.vocab_size)
        else:
            copies |= _separate_ends(job, decoders, headers)
        return Plan(
            config=config,
            num_experts=len(job.experts),
            experts_per_token=config.experts_per_sequence,
            routed_per="sequence",
            shared=shared,
            copies=copies,
            computed=learned_router(job, config, dtype),
            untrained=untrained_router(config),
            dtype=dtype,
            views=views_of(headers),
        )


def _check_one_architecture(job: Job, decoders: dict[ModelReference, Decoder]) -> None:
    architecture = decoders[job.donor].config.architectures[0]
    for model, decoder in decoders.items():
        if decoder.config.architectures[0] != architecture:
            raise UserError(
                f"{model} is a {decoder.config.architectures[0]} and {job.donor} a "
                f"{architecture}; `merge_method: hetero_moe` takes different architectures"
            )


def _trunks(
    job: Job,
    donor: Decoder,
    headers: Mapping[ModelReference, Headers],
    patterns: Sequence[str],
) -> tuple[dict[str, CopiedTensor], dict[str, SharedTensor]]:
    """The tensors of the experts without embedding and head, by their names in the output: each
    expert's own, and those that experts share by the patterns of their names.
    """
    copies: dict[str, CopiedTensor] = {}
    shared: dict[str, SharedTensor] = {}
    for index, model in enumerate(job.experts):
        for name in donor.trunk:
            if not any(re.search(pattern, name) for pattern in patterns):
                copies[f"experts.{index}.trunk.{name}"] = _copied(headers, model, name)
            elif index == 0:  # what experts share is stored with the first one alone
                shared[f"experts.0.trunk.{name}"] = donor.manifest.shared_tensor(name)
    return copies, shared


def _merged_ends(
    decoders: Mapping[ModelReference, Decoder], donor: Decoder, is_tied: bool, vocab_size: int
) -> dict[str, SharedTensor]:
    """The tensors of the one embedding and head for all experts, by their names in the output."""
    # They are merged under the names that they have in a source that is tied or untied as the
    # output is.
    headed = next((each for each in decoders.values() if each.is_tied == is_tied), donor)
    # Where vocabularies are aligned, those of the sources may have any size until then.
    manifest = headed.manifest.with_vocabulary(vocab_size)
    shared: dict[str, SharedTensor] = {}
    for key, name in headed.embedding.items():
        shared[f"embed_tokens.{key}"] = manifest.shared_tensor(name)
    for key, name in headed.head.items():
        shared[f"lm_head.{key}"] = manifest.shared_tensor(name)
    return shared


def _separate_ends(
    job: Job,
    decoders: Mapping[ModelReference, Decoder],
    headers: Mapping[ModelReference, Headers],
) -> dict[str, CopiedTensor]:
    """The tensors of each expert's own embedding and head, by their names in the output."""
    copies: dict[str, CopiedTensor] = {}
    for index, model in enumerate(job.experts):
        for key, name in decoders[model].embedding.items():
            copies[f"experts.{index}.embed_tokens.{key}"] = _copied(headers, model, name)
        for key, name in decoders[model].head.items():
            copies[f"experts.{index}.lm_head.{key}"] = _copied(headers, model, name)
    return copies


def _copied(
    headers: Mapping[ModelReference, Headers], model: ModelReference, name: str
) -> CopiedTensor:
    return CopiedTensor(model, name, headers[model].shapes[name])


def _base_expert(job: Job) -> int:
    """The index of the base among the experts; 0 where it is not one and does not matter."""
    if job.base in job.experts:
        return job.experts.index(job.base)
    if job.options.routing == "task_vector":
        remedy = "name one of `models:` as `base_model:`"
        if job.base:
            remedy = f"list {job.base} in `models:`"
        raise UserError(
            "routing: task_vector takes the gradient at the base model, which must be an expert: "
            f"{remedy}"
        )
    return 0


def _check_task_vector_layers(options: SeqMoeOptions, number: int) -> None:
    layers = options.task_vector_layers
    if layers is None:
        return
    if options.routing != "task_vector":
        raise UserError(
            "task_vector_layers is for routing: task_vector; nothing else compares layers"
        )
    if not layers or not all(0 <= layer < number for layer in layers):
        raise UserError(
            f"task_vector_layers is {layers}, but the models' {number} layers are 0 to {number - 1}"
        )


def _shared_patterns(donor: Decoder, options: SeqMoeOptions) -> list[str]:
    """Patterns of the names of the decoders' parameters that the experts share."""
    layers = re.escape(donor.layers)
    patterns = []
    # Whatever is in a layer and not in its FFN: attention, and the norms.
    if options.attention == "merged":
        try:
            _, ffn = attention_and_ffn(donor.a_layer)
        except ValueError as error:
            raise UserError(
                "attention: merged keeps the FFNs apart, which a layer of "
                f"{donor.config.architectures[0]} does not allow: {error}; take attention: separate"
            ) from error
        ffn_names = "|".join(map(re.escape, ffn))
        patterns.append(rf"^{layers}\.\d+\.(?!(?:{ffn_names})\.)")
    # Whatever is outside of all layers, such as the last norm.
    if options.embedding == "merged":
        patterns.append(rf"^(?!{layers}\.\d+\.)")
    return patterns


def _mixed_ffns(donor: Decoder, options: SeqMoeOptions) -> list[str] | None:
    """The names of the FFNs that are mixed in one pass; None with mix: output.

    `UserError` where the experts do not share all the rest, or an FFN is not one module.
    """
    if options.mix == "output":
        return None
    needed = {"attention": "merged", "embedding": "merged", "combine": "logits"}
    for key, value in needed.items():
        if getattr(options, key) != value:
            raise UserError(f"mix: ffn runs one stack for all experts: it needs {key}: {value}")
    _, ffn = attention_and_ffn(donor.a_layer)
    name, module = next(iter(ffn.items()))
    if len(ffn) > 1 or len(inspect.signature(module.forward).parameters) > 1:
        raise UserError(
            "mix: ffn mixes what a layer's FFN makes of one input; in "
            f"{donor.config.architectures[0]} that is not one module: take mix: output"
        )
    number = donor.config.num_hidden_layers
    return [f"{donor.layers}.{layer}.{name}" for layer in range(number)]


SEQ_MOE = SeqMoe(
    "seq_moe",
    "MergeME (mixture of whole decoders, routed per sequence)",
    MERGEME,
    "dense models of one architecture become experts, of which each sequence chooses some: by "
    "perplexity, for example",
)
