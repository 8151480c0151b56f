"""`hetero_moe`: dense models of different architectures become one mixture of whole decoders
(MergeME 3.2).

An embedding and a head are shared; projectors lead from the one to every expert and from there to
the other. The output speaks the base model's tokenizer.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.graph import Task
from pydantic import Field
from torch import Tensor

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.card import model_in_markdown
from mergekit_moe_ext.merging.method import CopiedTensor, Job, Plan, StructuralMethod
from mergekit_moe_ext.merging.sources import output_dtype, read_configs, read_headers
from mergekit_moe_ext.merging.tasks import Filled, RandomTensor
from mergekit_moe_ext.sequence.decoders import Decoder, read_decoders
from mergekit_moe_ext.sequence.options import SequenceOptions, learned_router, sequence_config
from mergekit_moe_ext.sequence.vocabulary import (
    AlignedRows,
    AveragedRows,
    TokenRows,
    align_vocabularies,
)

_MERGEME = "https://arxiv.org/abs/2502.00997"


class HeteroMoeOptions(SequenceOptions):
    routing: Literal["learned", "perplexity", "uniform"] = Field(
        "learned", description="what chooses the experts of a sequence; learned is to be trained"
    )
    embedding: Literal["average", "donor", "separate"] = Field(
        "average",
        description="the shared embedding and head are the average of all sources' (the paper), or "
        "the base model's; or each expert keeps its own, and there are no projectors",
    )
    projector: Literal["linear", "mlp"] | None = Field(
        None,
        description="between the shared embedding, an expert and the shared head: mlp if not given",
    )
    projector_init: Literal["random", "identity"] | None = Field(
        None,
        description="how projectors start: random if not given (the paper), or identity, which "
        "passes on what fits",
    )


class HeteroMoe(StructuralMethod):
    options_type = HeteroMoeOptions

    def shared_method_name(self, options: Any) -> str:
        return "linear"  # mergekit wants one; nothing is merged tensor by tensor

    def plan(self, job: Job) -> Plan:
        options = job.options
        _check(job)
        configs = read_configs(job)
        decoders = read_decoders(configs)
        headers = read_headers(
            job, configs, {model: decoder.manifest for model, decoder in decoders.items()}
        )
        experts, donor = [decoders[model] for model in job.experts], decoders[job.donor]
        is_separate = options.embedding == "separate"
        width = (
            donor.widths[0]
            if is_separate
            else max(width for expert in experts for width in expert.widths)
        )
        embedded = [job.donor] if options.embedding == "donor" else job.experts
        kind = None if is_separate else options.projector or "mlp"
        config = sequence_config(
            job,
            donor.config,
            experts,
            embedding="separate" if is_separate else "shared",
            base_expert=job.experts.index(job.donor),
            hidden_size=width,
            tie_word_embeddings=not is_separate
            and all(decoders[model].is_tied for model in embedded),
            projector=kind,
            projector_residual=kind == "mlp" and options.projector_init == "identity",
        )
        for of_expert in config.experts:  # all speak the donor's tokenizer
            of_expert.update(vocab_size=config.vocab_size, pad_token_id=None)
        config.dtype = dtype = output_dtype(job, headers)
        rows = align_vocabularies(job, configs, stand_ins=is_separate)
        if is_separate:
            computed = _own_vocabularies(job, decoders, rows, config.vocab_size, dtype)
        else:
            _check_heads(job, decoders)

            def averaged(names: Mapping[ModelReference, str]) -> AveragedRows:
                sources = []
                for model in embedded:
                    sources.append((job.load(model, names[model], str(dtype)), rows[model]))
                return AveragedRows(
                    sources=tuple(sources), shape=(config.vocab_size, width), dtype=str(dtype)
                )

            embeddings = {model: decoders[model].embedding["weight"] for model in embedded}
            computed = {"embed_tokens.weight": averaged(embeddings)}
            if not config.tie_word_embeddings:
                heads = {model: decoders[model].head_weight for model in embedded}
                computed["lm_head.weight"] = averaged(heads)
            for index, expert in enumerate(experts):
                into, out_of = expert.widths
                computed |= _projector(job, f"experts.{index}.proj_in", kind, width, into, dtype)
                computed |= _projector(job, f"experts.{index}.proj_out", kind, out_of, width, dtype)
        computed |= learned_router(job, config, dtype)
        copies = {}
        for index, model in enumerate(job.experts):
            for name in decoders[model].trunk:
                copy = CopiedTensor(model, name, headers[model].shapes[name])
                copies[f"experts.{index}.trunk.{name}"] = copy
        return Plan(
            config=config,
            num_experts=len(experts),
            experts_per_token=config.experts_per_sequence,
            routed_per="sequence",
            shared={},
            copies=copies,
            computed=computed,
            dtype=dtype,
            notes=_notes(job, rows, config.vocab_size),
        )


def _check(job: Job) -> None:
    """What cannot be, whatever the models."""
    options = job.options
    entries = [
        job.config.parameters or {},
        *(entry.parameters or {} for entry in job.config.models or []),
    ]
    for key in {key: None for given in entries for key in given}:
        if key not in HeteroMoeOptions.model_fields:
            raise UserError(
                f"hetero_moe merges nothing by a tensor method, so it has no use for `{key}`"
            )
    if job.donor not in job.experts:
        raise UserError(
            f"base_model: {job.donor}, whose tokenizer the output speaks, must be among `models:`"
        )
    if job.config.tokenizer or job.config.tokenizer_source:
        raise UserError("hetero_moe speaks the tokenizer of `base_model`: leave `tokenizer` out")
    if options.embedding == "separate":
        for key in ("projector", "projector_init"):
            if getattr(options, key) is not None:
                raise UserError(f"embedding: separate has no projectors: leave {key} out")


def _check_heads(job: Job, decoders: Mapping[ModelReference, Decoder]) -> None:
    for model in job.experts:
        if "bias" in decoders[model].head:
            raise UserError(
                f"the head of {model} has a bias, which a shared head has no place for; take "
                "embedding: separate"
            )


def _own_vocabularies(
    job: Job,
    decoders: Mapping[ModelReference, Decoder],
    rows: Mapping[ModelReference, TokenRows],
    vocab_size: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Every expert's own embedding and head, in the order of the donor's tokens."""
    tasks = {}
    for index, model in enumerate(job.experts):
        decoder = decoders[model]
        for part, tensors in (("embed_tokens", decoder.embedding), ("lm_head", decoder.head)):
            for key, name in tensors.items():
                tasks[f"experts.{index}.{part}.{key}"] = AlignedRows(
                    source=job.load(model, name, str(dtype)),
                    rows=rows[model],
                    shape=(vocab_size, *decoder.manifest.shapes[name][1:]),
                    dtype=str(dtype),
                )
    return tasks


class RectangularIdentity(Task[Tensor]):
    """(out, in): ones on the diagonal."""

    name: str
    shape: tuple[int, int]
    dtype: str

    def arguments(self) -> dict[str, Task]:
        return {}

    def execute(self, **_kwargs: object) -> Tensor:
        return torch.eye(*self.shape, dtype=dtype_from_name(self.dtype), device="cpu")


def _projector(
    job: Job, name: str, kind: str | None, in_features: int, out_features: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Its tensors. At random they are normal with a variance of one over the number of inputs."""
    is_identity = job.options.projector_init == "identity"

    def drawn(layer: str, rows: int, columns: int) -> dict[str, Any]:
        std = 1 / math.sqrt(columns)
        return {
            layer: RandomTensor(
                name=layer,
                shape=(rows, columns),
                mode="random",
                std=std,
                seed=job.seed,
                dtype=str(dtype),
            )
        }

    first, last = f"{name}.layers.0.weight", f"{name}.layers.2.weight"
    if kind == "linear":
        if is_identity:
            return {
                first: RectangularIdentity(
                    name=first, shape=(out_features, in_features), dtype=str(dtype)
                )
            }
        return drawn(first, out_features, in_features)
    between = max(in_features, out_features)
    if is_identity:
        zeros = Filled(name=last, shape=(out_features, between), dtype=str(dtype))
        return {**drawn(first, between, in_features), last: zeros}
    return {**drawn(first, between, in_features), **drawn(last, out_features, between)}


def _notes(job: Job, rows: Mapping[ModelReference, TokenRows], vocab_size: int) -> str:
    known = "\n".join(
        f"- {model_in_markdown(model)}: {int((rows[model].own >= 0).sum())} of {vocab_size}"
        for model in job.sources
        if model in rows
    )
    return f"Tokens of {model_in_markdown(job.donor)} that each source has:\n\n{known}"


HETERO_MOE = HeteroMoe(
    "hetero_moe",
    "MergeME (mixture of decoders of different architectures)",
    _MERGEME,
    "dense models of different architectures become experts behind projectors; each sequence "
    "chooses some",
)
