"""The method `hetero_moe`: dense models of different architectures become one mixture of whole
decoders (MergeME 3.2).

The experts share an embedding and a head. Projectors lead from the embedding to every expert and
from there to the head. The output has the base model's tokenizer.
"""

import itertools
import logging
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
from mergekit.common import ModelReference, dtype_from_name
from mergekit.graph import Task
from pydantic import Field
from torch import Tensor

from _mergekit_moe_ext_common.cards import in_markdown
from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.merging.card import model_in_markdown
from mergekit_moe_ext.merging.method import CopiedTensor, Job, Plan, StructuralMethod
from mergekit_moe_ext.merging.sources import (
    output_dtype,
    read_configs,
    read_headers,
    views_of,
)
from mergekit_moe_ext.merging.tasks import Filled, RandomTensor
from mergekit_moe_ext.modeling import SequenceMoEConfig
from mergekit_moe_ext.sequence.decoders import Decoder, read_decoders
from mergekit_moe_ext.sequence.options import (
    MERGEME,
    SequenceOptions,
    learned_router,
    sequence_config,
    untrained_router,
)
from mergekit_moe_ext.sequence.vocabulary import (
    AlignedBias,
    AlignedRows,
    AveragedRows,
    TokenRows,
    align_vocabularies,
)

LOG = logging.getLogger(__name__)


class HeteroMoeOptions(SequenceOptions):
    routing: Literal["learned", "perplexity", "uniform"] = Field(
        "learned",
        description="rule that chooses the experts of a sequence; a learned router has to be "
        "trained",
    )
    embedding: Literal["average", "donor", "separate"] = Field(
        "average",
        description="embedding and head of the experts: shared, and the average of all sources' "
        "(average, the paper) or the base model's (donor), or each expert's own, without "
        "projectors (separate)",
    )
    spelled_tokens: Literal["share", "mean", "unavailable"] | None = Field(
        None,
        description="probability, with embedding: separate, of a token that an expert has to "
        "spell: share (a part of its first piece's, which all tokens that begin with it share), "
        "mean (what the mean of its pieces' rows gives) or unavailable (next to none) [default: "
        "share]",
    )
    projector: Literal["linear", "mlp"] | None = Field(
        None,
        description="kind of the projectors between the shared embedding, an expert and the shared "
        "head [default: mlp]",
    )
    projector_init: Literal["random", "identity"] | None = Field(
        None,
        description="initial values of the projectors: random, or identity, which passes on as "
        "much of the states as fits [default: random (the paper)]",
    )


class HeteroMoe(StructuralMethod):
    options_type = HeteroMoeOptions

    def shared_method_name(self, options: Any) -> str:
        return "linear"  # mergekit asks for a method, but nothing is merged tensor by tensor

    def plan(self, job: Job) -> Plan:
        options = job.options
        _check(job)
        configs = read_configs(job)
        decoders = read_decoders(configs)
        manifests = {model: decoder.manifest for model, decoder in decoders.items()}
        headers = read_headers(job, configs, manifests)
        donor = decoders[job.donor]
        experts = [decoders[model] for model in job.experts]
        is_separate = options.embedding == "separate"
        if is_separate:
            width = donor.widths[0]
            projector = None
            is_tied = False
        else:
            width = max(itertools.chain.from_iterable(expert.widths for expert in experts))
            projector = options.projector or "mlp"
            is_tied = all(decoders[model].is_tied for model in _averaged_models(job))
        config = sequence_config(
            job,
            donor.config,
            experts,
            embedding="separate" if is_separate else "shared",
            base_expert=job.experts.index(job.donor),
            hidden_size=width,
            tie_word_embeddings=is_tied,
            projector=projector,
            projector_residual=projector == "mlp" and options.projector_init == "identity",
        )
        for expert_values in config.experts:  # all have the donor's tokenizer
            expert_values.update(vocab_size=config.vocab_size, pad_token_id=None)
        dtype = output_dtype(job, headers)
        config.dtype = dtype
        rows = align_vocabularies(job, configs)
        if is_separate:
            _warn_of_vetoes(job, rows, config)
            computed = _own_vocabularies(job, decoders, rows, config, dtype)
        else:
            _check_heads(job, decoders)
            computed = _shared_vocabulary(job, decoders, rows, config, dtype)
            for index, expert in enumerate(experts):
                name = f"experts.{index}"
                into, out_of = expert.widths
                computed |= _projector(job, f"{name}.proj_in", projector, width, into, dtype)
                computed |= _projector(job, f"{name}.proj_out", projector, out_of, width, dtype)
        computed |= learned_router(job, config, dtype)
        untrained = untrained_router(config)
        if not is_separate and options.projector_init != "identity":
            untrained["projectors"] = "random"
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
            views=views_of(headers),
            untrained=untrained,
            notes=_notes(job, rows, config.vocab_size),
        )


def _check(job: Job) -> None:
    """Check what can be seen without looking at any model."""
    options = job.options
    for entry in (job.config, *(job.config.models or [])):
        for key in entry.parameters or {}:
            if key not in HeteroMoeOptions.model_fields:
                raise UserError(
                    f"hetero_moe merges nothing by a tensor method, so it has no use for `{key}`"
                )
    if job.donor not in job.experts:
        raise UserError(
            f"base_model: {job.donor}, whose tokenizer the output gets, must be among `models:`"
        )
    if job.config.tokenizer or job.config.tokenizer_source:
        raise UserError("hetero_moe takes the tokenizer of `base_model`: leave `tokenizer` out")
    if options.embedding == "separate":
        for key in ("projector", "projector_init"):
            if getattr(options, key) is not None:
                raise UserError(f"embedding: separate has no projectors: leave {key} out")
    elif options.spelled_tokens is not None:
        raise UserError(
            "spelled_tokens is for embedding: separate; a shared head has a row for every token"
        )


def _warn_of_vetoes(
    job: Job, rows: Mapping[ModelReference, TokenRows], config: SequenceMoEConfig
) -> None:
    """Warn of tokens that one expert cannot give. In a sum of logits the others cannot either."""
    if config.experts_per_sequence == 1 or config.combine == "probabilities":
        return
    for model, of_model in rows.items():
        vetoed = of_model.lacking
        if job.options.spelled_tokens != "unavailable":
            # Rows stand in for a token that the model writes in pieces, be one its unknown token.
            vetoed = [token for token in vetoed if token not in of_model.stand_ins]
        number = len(vetoed)
        if number:
            LOG.warning(
                "%s cannot give %d of the donor's tokens, and with combine: logits neither can a "
                "mixture that it is part of; combine: probabilities leaves them to the other "
                "experts",
                model,
                number,
            )


def _averaged_models(job: Job) -> list[ModelReference]:
    """The models whose embeddings and heads the shared ones are made of."""
    return [job.donor] if job.options.embedding == "donor" else job.experts


def _check_heads(job: Job, decoders: Mapping[ModelReference, Decoder]) -> None:
    for model in job.experts:
        if "bias" in decoders[model].head:
            raise UserError(
                f"the head of {model} has a bias, which a shared head has no place for; take "
                "embedding: separate"
            )


def _shared_vocabulary(
    job: Job,
    decoders: Mapping[ModelReference, Decoder],
    rows: Mapping[ModelReference, TokenRows],
    config: SequenceMoEConfig,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """The shared embedding and, unless it is tied, the shared head (MergeME 3.2)."""
    shape = (config.vocab_size, config.hidden_size)
    models = _averaged_models(job)
    names = {"embed_tokens.weight": [decoders[model].embedding["weight"] for model in models]}
    if not config.tie_word_embeddings:
        names["lm_head.weight"] = [decoders[model].head_weight for model in models]
    tasks = {}
    for output, sources_names in names.items():
        sources = []
        for model, name in zip(models, sources_names, strict=True):
            sources.append((job.load(model, name, str(dtype)), rows[model]))
        tasks[output] = AveragedRows(sources=tuple(sources), shape=shape, dtype=str(dtype))
    return tasks


def _own_vocabularies(
    job: Job,
    decoders: Mapping[ModelReference, Decoder],
    rows: Mapping[ModelReference, TokenRows],
    config: SequenceMoEConfig,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """Every expert's own embedding and head, with their rows in the order of the donor's tokens.

    The configuration is told of heads that get a bias, and of those that are tied no more.
    """
    shares = job.options.spelled_tokens in (None, "share")
    biases = {}
    for model, of_model in rows.items():
        if shares:
            biases[model] = of_model.shares()
        else:
            with_stand_ins = job.options.spelled_tokens == "mean"
            biases[model] = of_model.availability(with_stand_ins=with_stand_ins)
    config.head_bias = any(bias.any() for bias in biases.values())
    tasks: dict[str, Any] = {}
    for index, model in enumerate(job.experts):
        decoder = decoders[model]
        of_model = rows[model]
        head = {"weight": decoder.head_weight}
        head_rows = of_model
        if shares and of_model.stand_ins:
            # A spelled token reads as the mean of its pieces, and is written as its first one.
            head_rows = of_model.first_pieces()
            config.experts[index]["tie_word_embeddings"] = False
        elif decoder.is_tied:
            head = {}
        if "bias" in decoder.head and not config.head_bias:
            head["bias"] = decoder.head["bias"]
        parts = (("embed_tokens", decoder.embedding, of_model), ("lm_head", head, head_rows))
        for part, tensors, part_rows in parts:
            for key, name in tensors.items():
                tasks[f"experts.{index}.{part}.{key}"] = AlignedRows(
                    source=job.load(model, name, str(dtype)),
                    rows=part_rows,
                    shape=(config.vocab_size, *decoder.manifest.shapes[name][1:]),
                    dtype=str(dtype),
                )
        if config.head_bias:
            own_bias = decoder.head.get("bias")
            tasks[f"experts.{index}.lm_head.bias"] = AlignedBias(
                name=f"experts.{index}.lm_head.bias",
                source=job.load(model, own_bias, str(dtype)) if own_bias else None,
                rows=head_rows,
                of_rows=biases[model],
                shape=(config.vocab_size,),
                dtype=str(dtype),
            )
    return tasks


class RectangularIdentity(Task[Tensor]):
    """A matrix (out, in) with ones on the diagonal."""

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
    """The tensors of a projector. Random ones are normal with a variance of one over the number of
    inputs, which keeps the scale of the states.
    """
    is_identity = job.options.projector_init == "identity"

    def random(layer: str, rows: int, columns: int) -> RandomTensor:
        return RandomTensor(
            name=layer,
            shape=(rows, columns),
            mode="random",
            std=1 / math.sqrt(columns),
            seed=job.seed,
            dtype=str(dtype),
        )

    first = f"{name}.layers.0.weight"
    if kind == "linear":
        shape = (out_features, in_features)
        if is_identity:
            return {first: RectangularIdentity(name=first, shape=shape, dtype=str(dtype))}
        return {first: random(first, *shape)}
    # An MLP that starts as the identity adds its output, at first zero, to its input.
    last = f"{name}.layers.2.weight"
    between = max(in_features, out_features)
    tensors: dict[str, Any] = {first: random(first, between, in_features)}
    if is_identity:
        tensors[last] = Filled(name=last, shape=(out_features, between), dtype=str(dtype))
    else:
        tensors[last] = random(last, out_features, between)
    return tensors


def _notes(job: Job, rows: Mapping[ModelReference, TokenRows], vocab_size: int) -> str:
    """A list in Markdown: what each source has of the donor's tokens, with examples."""
    donor = model_in_markdown(job.donor)
    lines = [f"The {vocab_size} tokens of {donor}, as each source has them:", ""]
    for model in job.sources:
        of_model = rows[model]
        own = of_model.own[of_model.own >= 0]
        number_of_rows = len(own.unique())
        parts = [f"{len(own)} its own"]
        if number_of_rows < len(own):
            parts[0] += f" ({number_of_rows} of its tokens)"
        numbers = {"spelled": len(of_model.spelled), "missing": len(of_model.missing)}
        for kind, number in numbers.items():
            examples = in_markdown(", ".join(of_model.examples.get(kind, ())))
            parts.append(f"{number} {kind}" + (f" ({examples})" if examples else ""))
        lines.append(f"- {model_in_markdown(model)}: {', '.join(parts)}")
    return "\n".join(lines)


HETERO_MOE = HeteroMoe(
    "hetero_moe",
    "MergeME (mixture of decoders of different architectures)",
    MERGEME,
    "dense models of different architectures become experts behind projectors, of which each "
    "sequence chooses some",
)
