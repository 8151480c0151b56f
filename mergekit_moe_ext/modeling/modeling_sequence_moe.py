"""A mixture of whole decoders of which each sequence chooses some (MergeME).

A choice is made once per sequence, from a prefix: the prompt in `generate`, else the first
`routing_tokens` tokens. The chosen experts run on the sequences that chose them, each with a
key-value cache of its own, and what they give is added up, weighed by the coefficients, before the
head. Labels inside the prefix are left out of the loss: there the choice already knows what is to
be predicted.
"""

import inspect
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import Cache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_sequence_moe import SequenceMoEConfig
from .decoder_states import ATTENTIONS, HIDDEN_STATES, DecoderStates
from .host_cache import (
    OUTPUT_NAME,
    begin_sequences,
    cache_in,
    generating,
    is_generating,
    name_of_cache,
    with_cache_renamed,
)
from .mixed_ffns import MixedFFNs
from .packed_rows import PackedRows, packed_rows, without_signs
from .padding import inferred_masks
from .prefix_labels import IGNORED, without_prefix_labels
from .sequence_cache import SequenceMoECache, select_rows
from .sequence_shares import Share, added, shares_of
from .token_lookup import tokens_of

# An argument of `forward`, of `generate` alone: this pass goes over a prompt, of which all chooses.
_IS_PROMPT = "prompt_chooses"
_SCORED_AT_ONCE = 4096  # positions whose logits are held at the same time
# transformers collects these from its direct children alone
_TAKEN_FROM_TRUNKS = (
    "_no_split_modules",
    "_skip_keys_device_placement",
    "_keep_in_fp32_modules",
    "_keep_in_fp32_modules_strict",
    "_keys_to_ignore_on_load_unexpected",
)
_LAYER = re.compile(r"\.(\d+)\.")
# Taking a gradient puts other tensors in the place of the base's parameters for a while: threads of
# a server do it one after the other.
_TAKING_GRADIENTS = threading.Lock()
# What PEFT adds to the name of a parameter when it wraps its module.
_WRAPPED = re.compile(r"\.base_layer|\.original_module|\.modules_to_save\.[^.]+")


def _refuse_merge(name: str, *_: Any, **__: Any) -> None:
    """What takes the place of an adapter's `merge`, for a module of this name."""
    raise ValueError(
        f"{name} has an adapter of its own, but its weight is shared by all experts, so that the "
        "adapter cannot be merged into it: leave the adapter unmerged, or train one on the FFNs "
        "alone"
    )


@dataclass
class SequenceMoEOutput(CausalLMOutputWithPast):
    """What `SequenceMoEForCausalLM` returns.

    `coefficients` (batch, experts) are what each sequence chose; `aux_loss` is the load-balancing
    loss, without its weight.
    """

    coefficients: Tensor | None = None
    aux_loss: Tensor | None = None


class Batch(NamedTuple):
    """Tokens (rows, length), with the mask over everything up to them, and their positions.

    Mask and positions may be None. There may be what the shared embedding would make of the tokens,
    (rows, length, width), which may be None then. `may_choose` (rows, length) says which tokens
    may, where the mask does not.
    """

    tokens: Any
    mask: Tensor | None
    positions: Tensor | None
    embedded: Tensor | None = None
    may_choose: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """(rows, length)."""
        return (self.tokens if self.embedded is None else self.embedded).shape[:2]

    @property
    def device(self) -> torch.device:
        return (self.tokens if self.embedded is None else self.embedded).device

    @property
    def real(self) -> Tensor:
        """Which tokens are not padding: (rows, length)."""
        if self.may_choose is not None:
            return self.may_choose.bool()
        if self.mask is None:
            return torch.ones(self.shape, dtype=torch.bool, device=self.device)
        return self.mask[:, -self.shape[1] :].bool()

    def of(self, rows: Tensor) -> "Batch":
        return self._each(lambda part: part[rows])

    def until(self, length: int) -> "Batch":
        return self._each(lambda part: part[:, :length])

    def copied(self) -> "Batch":
        return self._each(Tensor.clone)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        return Batch(*(None if part is None else change(part) for part in self))


class Choice(NamedTuple):
    """What a batch is run with.

    Coefficients (rows, experts); the load-balancing loss; what experts gave already, by expert; and
    the prefix (rows, length) that chose, None where nothing was chosen in this pass.
    """

    coefficients: Tensor
    aux_loss: Tensor | None
    ran: dict[int, Any]
    prefix: Tensor | None


class Projector(nn.Module):
    """A map from one width to another (MergeME 3.2)."""

    def __init__(self, kind: str, residual: bool, in_features: int, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features
        self.residual = residual
        if kind == "linear":
            self.layers = nn.Sequential(nn.Linear(in_features, out_features, bias=False))
        else:
            width = max(in_features, out_features)
            self.layers = nn.Sequential(
                nn.Linear(in_features, width, bias=False),
                nn.GELU(),
                nn.Linear(width, out_features, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        projected = self.layers(x)
        if not self.residual:
            return projected
        # The input, cut or filled with zeros to the width of the output.
        missing = max(0, self.out_features - x.shape[-1])
        return projected + functional.pad(x[..., : self.out_features], (0, missing))


class DecoderExpert(nn.Module):
    """One decoder, from embeddings to what its head would read.

    The decoder is the source's own class, its embedding and head taken out, so that whatever it
    does before and after its layers (scaling, say) it still does. Its cap on logits is left to the
    model, which caps mixtures.
    """

    def __init__(self, config: PretrainedConfig, mixture: SequenceMoEConfig, name: str) -> None:
        super().__init__()
        self.name = name  # for messages
        self.trunk: Any = getattr(transformers, config.architectures[0])(config)
        embedding = self.trunk.get_input_embeddings()
        head = self.trunk.get_output_embeddings()
        self._leave_out_vocabulary()
        # The mixture itself says what is tied in it.
        self.trunk._tied_weights_keys = None
        self.positions_in_table = _positions_in_table(self.trunk)
        parameters = inspect.signature(self.trunk.forward).parameters
        self.cache_name = name_of_cache(parameters) or OUTPUT_NAME
        self.takes = {"position_ids", "use_cache", self.cache_name} & set(parameters)
        if mixture.embedding == "separate":
            self.embed_tokens = embedding
            self.lm_head = head
            if mixture.head_bias and head.bias is None:
                head.bias = nn.Parameter(torch.zeros(head.out_features))
            return
        scale = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", 1.0))
        self.scale = float(scale)
        if mixture.projector:
            project = partial(Projector, mixture.projector, mixture.projector_residual)
            self.proj_in = project(mixture.hidden_size, embedding.embedding_dim)
            self.proj_out = project(head.in_features, mixture.hidden_size)

    def forward(
        self,
        batch: Batch,
        shared: Tensor | None = None,
        cache: Cache | None = None,
        *,
        with_head: bool = False,
        outputs: Mapping[str, Any] | None = None,
        take: Callable[[Any], None] | None = None,
    ) -> Tensor:
        """(rows, length) to (rows, length, width), or to logits by the expert's own head.

        shared: what the shared embedding makes of the tokens, if the expert has none of its own.
        outputs: arguments that ask the decoder for hidden states, say; `take` is given its output.
        """
        self._check_positions(batch, cache)
        if shared is None:
            x = self.embed_tokens(batch.tokens)
        else:
            x = shared
            if hasattr(self, "proj_in"):
                x = self.proj_in(x)
            if self.scale != 1:
                x = x * torch.tensor(self.scale, dtype=x.dtype, device=x.device)
        more = {
            "position_ids": batch.positions,
            self.cache_name: cache,
            "use_cache": cache is not None,
        }
        more = {name: more[name] for name in sorted(self.takes)}
        more |= outputs or {}
        output = self.trunk(inputs_embeds=x, attention_mask=batch.mask, **more)
        if take is not None:
            take(output)
        y = output.logits
        if hasattr(self, "proj_out"):
            y = self.proj_out(y)
        return self.lm_head(y) if with_head else y

    def _leave_out_vocabulary(self) -> None:
        self.trunk.set_input_embeddings(None)
        self.trunk.set_output_embeddings(nn.Identity())

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> None:
        """Do what transformers does to the embedding and the head of the expert's own."""
        self.trunk.set_input_embeddings(self.embed_tokens)
        self.trunk.set_output_embeddings(self.lm_head)
        self.trunk.resize_token_embeddings(*args, **kwargs)
        self.embed_tokens = self.trunk.get_input_embeddings()
        self.lm_head = self.trunk.get_output_embeddings()
        self._leave_out_vocabulary()

    def _check_positions(self, batch: Batch, cache: Cache | None) -> None:
        """`ValueError` for a text that is longer than the decoder's table of positions."""
        limit = self.positions_in_table
        length = batch.shape[1] + (0 if cache is None else cache.get_seq_length())
        if limit is None or length <= limit:
            return
        # Padding takes no position.
        if batch.positions is None or int(batch.positions.max()) >= limit:
            raise ValueError(
                f"the expert {self.name!r} has {limit} positions, and a sequence here has {length} "
                "tokens: shorten it, or leave that expert out of the mixture"
            )


def _positions_in_table(trunk: PreTrainedModel) -> int | None:
    """How many positions a decoder has that looks them up in a table; None for any other.

    Some tables begin with a row or two for padding.
    """
    limit = getattr(trunk.config, "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    tables = [module for module in trunk.modules() if isinstance(module, nn.Embedding)]
    has_table = any(limit <= table.num_embeddings <= limit + 2 for table in tables)
    return limit if has_table else None


class SequenceMoEForCausalLM(PreTrainedModel, GenerationMixin):
    """Whole decoders as experts, chosen per sequence."""

    config_class = SequenceMoEConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: SequenceMoEConfig) -> None:
        super().__init__(config)
        configs = config.expert_configs()
        for of_expert in configs:
            # sdpa is only the default, which some decoders refuse.
            if config._attn_implementation not in (None, "sdpa"):
                of_expert._attn_implementation = config._attn_implementation
        self.experts: Any = nn.ModuleList()
        for of_expert, name in zip(configs, config.expert_names, strict=True):
            self.experts.append(DecoderExpert(of_expert, config, name))
        if config.embedding == "shared":
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        if config.routing == "learned":
            width = self.get_input_embeddings().embedding_dim
            self.router: Any = nn.Linear(width, len(configs), bias=False)
        # Adapters that are put in later bring parameters that are no part of a task vector.
        own_parameters = [name for name, _ in self.experts[config.base_expert].named_parameters()]
        self._own_parameters = frozenset(own_parameters)
        self.mixed_ffns: MixedFFNs | None = None
        if config.mixed_ffns:
            self.mixed_ffns = MixedFFNs(self.experts, config.mixed_ffns)
        for name in _TAKEN_FROM_TRUNKS:
            items: set[str] = set()
            for expert in self.experts:
                items |= set(getattr(expert.trunk, name) or ())
            setattr(self, name, items)
        # save_pretrained looks here
        self._tied_weights_keys = self.get_expanded_tied_weights_keys()
        self.post_init()

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "peft_config":  # the last thing that PEFT does when it has put an adapter in
            self._refuse_merges_into_shared_parameters()

    def _refuse_merges_into_shared_parameters(self) -> None:
        """Make the adapters of parameters that experts share refuse to be merged into them.

        PEFT gives every expert's copy factors of its own, and would add all of them to the one
        weight.
        """
        patterns = [re.compile(pattern) for pattern in self.config.shared_parameters]
        for index, expert in enumerate(self.experts):
            for name, module in expert.trunk.named_modules():
                if not (hasattr(module, "base_layer") and hasattr(module, "merge")):
                    continue
                if any(pattern.search(f"{name}.") for pattern in patterns):
                    module.merge = partial(_refuse_merge, f"experts.{index}.trunk.{name}")

    def get_input_embeddings(self) -> Any:
        """The shared embedding; the base expert's, where each has its own."""
        return self._with_vocabulary().embed_tokens

    def get_output_embeddings(self) -> Any:
        """The shared head; the base expert's, where each has its own."""
        return self._with_vocabulary().lm_head

    def _with_vocabulary(self) -> Any:
        """The module whose embedding and head are taken for the model's."""
        if self.config.embedding == "shared":
            return self
        return self.experts[self.config.base_expert]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self._with_vocabulary().embed_tokens = value

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self._with_vocabulary().lm_head = new_embeddings

    def _init_weights(self, module: nn.Module) -> None:
        """Start embeddings and heads that were taken out of a decoder as that decoder says.

        Gemma, say, has a scale of its own.
        """
        for expert in self.experts:
            if module in (getattr(expert, "embed_tokens", None), getattr(expert, "lm_head", None)):
                expert.trunk._init_weights(module)
                return
        super()._init_weights(module)

    def _adjust_bias(self, *args: Any) -> None:
        """Nothing happens here.

        Tying would pad the bias beside a tied weight, as of a head that grew, and spoil GPT-2's
        layers.
        """

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Any:
        """Resize the vocabulary as transformers does, of every expert that has one of its own."""
        size = (new_num_tokens, pad_to_multiple_of, mean_resizing)
        if self.config.embedding == "shared":
            super().resize_token_embeddings(*size)
        else:
            for expert in self.experts:
                expert.resize_token_embeddings(*size)
        embedding = self.get_input_embeddings()
        self.vocab_size = self.config.vocab_size = embedding.num_embeddings
        for values in self.config.experts:
            values["vocab_size"] = self.vocab_size
        self.tie_weights()
        return embedding

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """The names of parameters that are stored once, by the names of their copies.

        These are heads that are tied to embeddings, and what experts share.
        """
        patterns = [re.compile(pattern) for pattern in self.config.shared_parameters]
        names = [name for name, _ in self.named_parameters(remove_duplicate=False)]
        first = "experts.0.trunk."
        tied = {}
        for name in names:
            # experts.<index>.trunk.<name in the decoder>, or experts.<index>.lm_head.weight
            parts = name.split(".", 3)
            if len(parts) < 4:  # outside of the experts
                continue
            _, index, module, inner = parts
            is_shared = any(pattern.search(inner) for pattern in patterns)
            if module == "trunk" and index != "0" and is_shared:
                tied[name] = first + inner
            is_head = module == "lm_head" and inner == "weight"
            if is_head and self._is_tied(int(index)):
                tied[name] = f"experts.{index}.embed_tokens.weight"
        if self.config.embedding == "shared" and self.config.tie_word_embeddings:
            tied["lm_head.weight"] = "embed_tokens.weight"
        return tied

    def _is_tied(self, expert: int) -> bool:
        return bool(self.experts[expert].trunk.config.tie_word_embeddings)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: SequenceMoECache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        coefficients: Tensor | None = None,
        return_dict: bool | None = None,
        inputs_embeds: Tensor | None = None,
        output_hidden_states: bool | Sequence[int] | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits, and the loss over `labels` outside the prefix.

        `coefficients` (batch, experts), or (1, experts) for all sequences, say how much each expert
        counts, instead of a choice; those with 0 are not run. `past_key_values=` is the cache's
        name in transformers before 5.24, and is taken too. `inputs_embeds` (batch, length, width)
        stand for what the embedding makes of tokens. `output_hidden_states` and
        `output_attentions` give, per layer, those of each sequence's expert; of several experts
        their sum, weighed by the coefficients; `ValueError` where their sizes differ.

        `position_ids` that start again within a row, without a mask, say that it has several
        documents. Each of them is a sequence, and `coefficients` are then (documents, experts).
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        kwargs = with_cache_renamed({**kwargs, "cache": cache}, {"cache": cache})
        cache = kwargs.pop("cache")
        packed = self._packed(
            input_ids, inputs_embeds, attention_mask, position_ids, cache, use_cache, kwargs
        )
        kwargs = without_signs(kwargs)
        if packed is not None:
            assert position_ids is not None
            output = self._of_packed(
                packed,
                {
                    "input_ids": input_ids,
                    "inputs_embeds": inputs_embeds,
                    "position_ids": position_ids.expand(packed.documents.shape),
                    "labels": labels,
                    "shift_labels": kwargs.pop("shift_labels", None),
                },
                logits_to_keep,
                coefficients=coefficients,
                output_hidden_states=output_hidden_states,
                output_attentions=output_attentions,
                **kwargs,
            )
            return output if return_dict is not False else output.to_tuple()
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        is_prompt = kwargs.pop(_IS_PROMPT, False) or cache is not None
        if cache is None and use_cache:
            cache = SequenceMoECache()
        batch = self._batch(
            input_ids, inputs_embeds, attention_mask, position_ids, cache, coefficients
        )
        choice = self._choice(batch, cache, coefficients, is_prompt=is_prompt, use_cache=use_cache)
        coefficients, aux_loss, ran, prefix = choice
        if output_hidden_states or output_attentions:
            ran = {}  # which holds none
        if labels is not None and prefix is not None and self._chooses_by_prefix():
            kwargs = without_prefix_labels(
                {**kwargs, "labels": labels}, prefix, training=self.training
            )
            labels = kwargs.pop("labels")
        states = DecoderStates(batch.shape[0], output_hidden_states, output_attentions)
        logits = self._logits(batch, coefficients, cache, ran, logits_to_keep, states)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
            if aux_loss is not None and self.training:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        output = SequenceMoEOutput(
            loss=loss,
            logits=logits,
            coefficients=coefficients,
            aux_loss=aux_loss,
            hidden_states=states.of_batch(HIDDEN_STATES),
            attentions=states.of_batch(ATTENTIONS),
            **{OUTPUT_NAME: cache},
        )
        return output if return_dict is not False else output.to_tuple()

    def _packed(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
        use_cache: bool | None,
        arguments: Mapping[str, Any],
    ) -> PackedRows | None:
        """The documents of the input of `forward`; None where each of its rows is one."""
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        if tokens is None:
            return None
        has_cache = cache is not None or bool(use_cache)
        shape = tokens.shape[:2]
        return packed_rows(shape, position_ids, attention_mask, arguments, has_cache=has_cache)

    def _of_packed(
        self,
        packed: PackedRows,
        by_token: Mapping[str, Tensor | None],
        logits_to_keep: int | Tensor,
        **more: Any,
    ) -> SequenceMoEOutput:
        """The output for packed rows, whose documents are run as the rows of a batch.

        `by_token` are arguments of `forward` of shape (rows, tokens, …), and `more` are others. The
        output is by row and token again, but for the coefficients, (documents, experts).
        """
        if more["output_attentions"]:
            raise ValueError(
                "output_attentions: each document of a packed row has attentions of its own, which "
                "do not fit into one tensor: give each document a row"
            )
        apart: dict[str, Any] = {}
        for name, tensor in by_token.items():
            if tensor is not None:
                fill = IGNORED if name in ("labels", "shift_labels") else 0
                apart[name] = packed.apart(tensor, fill)
        mask = packed.apart(torch.ones_like(packed.documents))
        output = self.forward(attention_mask=mask, use_cache=False, **apart, **more)
        output.logits = packed.together(output.logits)[:, _positions_to_keep(logits_to_keep)]
        if output.hidden_states is not None:
            output.hidden_states = tuple(
                state if state is None else packed.together(state) for state in output.hidden_states
            )
        return output

    def _batch(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Any,
        coefficients: Tensor | None,
    ) -> Batch:
        """The input of `forward`, checked, with the mask of padding that nobody told.

        `ValueError` for what does not say what is needed, or is for another kind of model.
        """
        if cache is not None and not isinstance(cache, SequenceMoECache):
            kind = type(cache).__name__
            raise ValueError(f"the cache is a {kind}; a sequence MoE needs a SequenceMoECache()")
        has_choice = coefficients is not None or (
            cache is not None and cache.coefficients is not None
        )
        tokens, embedded = self._inputs(input_ids, inputs_embeds, attention_mask, has_choice)
        # Where `generate` has lost the cache, the mask is too long, and the choice tells of it.
        chooses = not has_choice and self.config.routing != "uniform"
        if attention_mask is not None and not (chooses and is_generating(self)):
            source: Any = input_ids if inputs_embeds is None else inputs_embeds
            rows, length = source.shape[:2]
            expected = (rows, length + (0 if cache is None else cache.length))
            if tuple(attention_mask.shape) != expected:
                raise ValueError(
                    f"attention_mask= is of shape {tuple(attention_mask.shape)}, and has to be of "
                    f"{expected}: a row per sequence, and a column per token so far"
                )
        may_choose = None
        if attention_mask is None and position_ids is None:
            attention_mask, may_choose = self._inferred_masks(tokens, cache)
        positions = _positions(tokens, embedded, attention_mask, position_ids)
        return Batch(tokens, attention_mask, positions, embedded, may_choose)

    def _choice(
        self,
        batch: Batch,
        cache: SequenceMoECache | None,
        coefficients: Tensor | None,
        *,
        is_prompt: bool,
        use_cache: bool,
    ) -> Choice:
        """The choice that the cache keeps, or that was given, or else is made here."""
        if cache is not None and cache.coefficients is not None:
            if cache.batch_size != batch.shape[0]:
                raise ValueError(
                    f"this cache is of {cache.batch_size} sequences, and the input of "
                    f"{batch.shape[0]}: start with an empty one"
                )
            return Choice(cache.coefficients, None, {}, None)
        if coefficients is not None:
            return Choice(self._checked(coefficients, batch.shape[0]), None, {}, None)
        # Uniform routing chooses nothing, so that a cache need not come back.
        # Nor must it where a pass of somebody's own says that it keeps none.
        if self.config.routing != "uniform" and (is_prompt or use_cache):
            begin_sequences(self)
        prefix = self._prefix(batch, whole=is_prompt)
        return Choice(*self._route(batch, prefix, cache), prefix)

    def _inferred_masks(
        self,
        tokens: Tensor | None,
        cache: SequenceMoECache | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The masks, of attention and of choosing, of tokens that came without any.

        Padding stays what it was in the steps that follow with a cache.
        """
        if tokens is None:
            return None, None
        if cache is not None and cache.length:
            if cache.mask is None:
                return None, None
            new = cache.length + tokens.shape[1] - cache.mask.shape[1]
            cache.mask = functional.pad(cache.mask, (0, new), value=1)
            return cache.mask, None
        masks = inferred_masks(tokens, self.config, self.config.special_token_ids)
        if cache is not None:
            cache.mask = masks.attention
        return masks

    # Where a cache is filled, as `generate` does, the whole input is a prompt, and what is
    # predicted comes later. A plain pass goes over prompt and answer at once: only a part that is
    # fixed in advance may choose there, or the choice would know the answer.
    def _prefix(self, batch: Batch, *, whole: bool) -> Tensor:
        """Which tokens choose: (batch, length)."""
        if whole or self.config.routing_prefix == "sequence":
            return batch.real
        return batch.real & (batch.real.cumsum(dim=1) <= self.config.routing_tokens)

    def _chooses_by_prefix(self) -> bool:
        return self.config.routing != "uniform" and self.config.routing_prefix != "sequence"

    def _route(
        self,
        batch: Batch,
        prefix: Tensor,
        cache: SequenceMoECache | None,
    ) -> tuple[Tensor, Tensor | None, dict[int, Any]]:
        """Coefficients (batch, experts), the load-balancing loss, and what experts gave already.

        That is by expert, for all of the batch, with a cache to go into `cache` if there is one.
        """
        number = len(self.experts)
        k = self.config.experts_per_sequence
        aux_loss: Tensor | None = None
        ran: dict[int, Any] = {}
        if self.config.routing == "uniform":
            scores = torch.zeros(len(prefix), number, device=prefix.device)
        elif self.config.routing == "learned":
            scores = self._router_scores(batch, prefix)
        elif self.config.routing == "perplexity":
            # Where FFNs are mixed no expert's own pass is one that the batch needs.
            is_needed = self.mixed_ffns is None
            reuse = is_needed and not self.training and not torch.is_grad_enabled()
            scores, ran = self._inverse_perplexities(batch, prefix, cache, reuse=reuse)
        else:
            scores = self._task_vector_similarities(batch, prefix)
        coefficients = torch.softmax(_largest(scores, k), dim=-1)
        # A heuristic that has no token to predict in a prefix says nothing: all experts alike.
        if self.config.routing in ("perplexity", "task_vector"):
            is_blind = ~self._scored(batch, prefix).any(dim=1, keepdim=True)
            alike = torch.full_like(coefficients, 1 / number)
            coefficients = torch.where(is_blind.to(coefficients.device), alike, coefficients)
        # As in a mixture of FFNs: how often an expert is chosen times its probability before the
        # choice, which alone has a gradient. 1 at balance.
        if self.config.routing == "learned" and self.training:
            frequency = (coefficients > 0).float().mean(dim=0) / k
            probability = torch.softmax(scores, dim=-1).mean(dim=0)
            aux_loss = number * (frequency * probability).sum()
        return coefficients, aux_loss, ran

    def router_scores(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """What a learned router makes of each sequence in a plain pass: (batch, experts), float32.

        The largest `experts_per_sequence` of a sequence are the experts that it chooses. Without a
        mask nothing is padding.
        """
        may_choose = None
        if attention_mask is None:
            attention_mask, may_choose = self._inferred_masks(input_ids, None)
        batch = Batch(input_ids, attention_mask, None, may_choose=may_choose)
        return self._router_scores(batch, self._prefix(batch, whole=False))

    def _router_scores(self, batch: Batch, prefix: Tensor) -> Tensor:
        """What the router makes of the prefix's mean embedding: (batch, experts) in float32."""
        k = self.config.experts_per_sequence
        if self.training and k == 1 < len(self.experts) and self.router.weight.requires_grad:
            raise ValueError(
                "a router that keeps one expert gets no gradient, since the softmax over one is "
                "always 1: set experts_per_sequence to 2 or more, or freeze the router"
            )
        embedded = batch.embedded
        if embedded is None:
            embedded = self.get_input_embeddings()(batch.tokens)
        total = torch.where(prefix[..., None], embedded, 0).sum(dim=1)
        mean = total / prefix.sum(dim=1, keepdim=True).clamp(min=1)
        # In the precision of the router: rounded scores would flip choices that are nearly even.
        with torch.autocast(mean.device.type, enabled=False):
            return self.router(mean.to(self.router.weight.dtype)).float()

    def _scored(self, batch: Batch, prefix: Tensor) -> Tensor:
        """Which tokens of the prefix a heuristic predicts: (batch, length).

        Padding and special tokens are left out, and tokens after padding.
        """
        special = torch.tensor(self.config.special_token_ids, device=batch.device)
        scored = prefix & ~torch.isin(batch.tokens, special)
        before = functional.pad(batch.real[:, :-1], (1, 0))
        return scored & before

    @torch.no_grad()
    def _inverse_perplexities(
        self,
        batch: Batch,
        prefix: Tensor,
        cache: SequenceMoECache | None,
        *,
        reuse: bool,
    ) -> tuple[Tensor, dict[int, Any]]:
        """1 / PPL(x | expert) of the prefix (batch, experts) in float32, and what experts gave.

        The latter is by expert, with a cache to go into `cache` if there is one, and empty unless
        it is to be reused and the prefix was the whole input.
        """
        length = int(prefix.any(dim=0).nonzero().max()) + 1 if prefix.any() else 0
        scored = self._scored(batch, prefix)[:, :length]
        # In `generate` the prefix is the whole prompt: the experts that are chosen need not run on
        # it once more.
        is_whole = reuse and length == batch.shape[1]
        rows, columns = scored.nonzero(as_tuple=True)
        targets = batch.tokens[rows, columns].long()
        scores = []
        ran: dict[int, Any] = {}
        for index, expert in enumerate(self.experts):
            of_expert = None
            if cache is not None and is_whole:
                of_expert = cache.new(expert.trunk.config)
            with _evaluating(expert):
                output = self._run(index, batch.until(length), of_expert)
            # The logits of all positions, over a large vocabulary, would take more memory than
            # anything else here: they are made for some positions at a time.
            cap = self.config.logit_softcaps[index]
            losses = torch.zeros(scored.shape, device=scored.device)
            for part in torch.arange(len(rows), device=rows.device).split(_SCORED_AT_ONCE):
                # What stands before a token predicts it.
                before = columns[part].to(output.device) - 1
                hidden = output[rows[part].to(output.device), before]
                logits = self._capped(self._head(index)(hidden), cap).float()
                labels = targets[part].to(logits.device)
                loss = functional.cross_entropy(logits, labels, reduction="none")
                losses[rows[part], columns[part]] = loss.to(losses.device)
            mean_losses = losses.sum(dim=1) / scored.sum(dim=1).clamp(min=1)
            scores.append(torch.exp(-mean_losses))
            if is_whole:
                ran[index] = output, of_expert
        return torch.stack(scores, dim=-1).nan_to_num(0.0), ran

    # Appendix C of MergeME: an expert fits a sequence where its task vector, here base minus
    # expert, points where the loss on the sequence grows at the base. Gradients are of one
    # sequence, so that sequences go one by one; a hook takes each parameter's gradient as soon as
    # it is there, has its inner products taken and lets it go, so that there is never a whole
    # gradient in memory. `generate` may run in inference mode, in which nothing has a gradient: it
    # is left here.
    def _task_vector_similarities(self, batch: Batch, prefix: Tensor) -> Tensor:
        """Cosine of the gradient at the base expert with base minus expert: (batch, experts).

        It is in float32, over the parameters that experts have of their own; the base has 0.
        """
        base = self.experts[self.config.base_expert]
        scored = self._scored(batch, prefix)
        comparison = _Comparison(self.experts, self.config.base_expert)
        similarities = []
        with (
            _TAKING_GRADIENTS,
            torch.inference_mode(False),
            torch.enable_grad(),
            _evaluating(base),
        ):
            names = [name for name, _ in base.named_parameters() if self._is_compared(name)]
            of_base = _outside_inference(base)
            of_head = {}
            if self.config.embedding == "shared":
                of_head = _outside_inference(self.lm_head)
            for row in range(batch.shape[0]):
                comparison.start()
                # Copies that share the parameters' memory: the parameters' own gradients, which
                # belong to a training around this, are left alone.
                leaves = {}
                for name in names:
                    parameter = of_base.get(name, base.get_parameter(name))
                    leaf = parameter.detach().requires_grad_()
                    leaf.register_post_accumulate_grad_hook(partial(comparison.take, name))
                    leaves[name] = leaf
                one = batch.of(torch.tensor([row], device=batch.device)).copied()
                if scored[row].any():
                    stand_ins = {**of_base, **leaves}
                    loss = self._loss_at_base(base, stand_ins, of_head, one, scored[row].clone())
                    loss.backward(inputs=list(leaves.values()))
                similarities.append(comparison.cosines())
        return torch.stack(similarities).to(batch.device)

    def _is_compared(self, name: str) -> bool:
        own_name = _WRAPPED.sub("", name)
        if own_name not in self._own_parameters:
            return False
        inner = own_name.removeprefix("trunk.")
        if any(re.search(pattern, inner) for pattern in self.config.shared_parameters):
            return False
        layers = self.config.task_vector_layers
        layer = _LAYER.search(inner)
        return layers is None or (layer is not None and int(layer[1]) in layers)

    def _loss_at_base(
        self,
        base: nn.Module,
        of_base: dict[str, Tensor],
        of_head: dict[str, Tensor],
        one: Batch,
        scored: Tensor,
    ) -> Tensor:
        """The base expert's mean loss on a batch of one, at the tokens `scored` (length,).

        `of_base` and `of_head`, the shared head's, stand in for parameters of the same names.
        """
        with torch.no_grad():
            shared = self._embedded(one)
        if shared is None:
            logits = functional_call(base, of_base, (one,), {"with_head": True})
        else:
            hidden = functional_call(base, of_base, (one, shared))
            logits = functional_call(self.lm_head, of_head, (hidden,))
        logits = self._capped(logits, self.config.logit_softcaps[self.config.base_expert])
        columns = scored.nonzero()[:, 0].to(logits.device)
        targets = one.tokens[0, columns.to(one.tokens.device)].long()
        return functional.cross_entropy(logits[0, columns - 1].float(), targets)

    def _run(
        self,
        index: int,
        batch: Batch,
        cache: Cache | None,
        **more: Any,
    ) -> Tensor:
        return self.experts[index](batch, self._embedded(batch), cache, **more)

    def _embedded(self, batch: Batch) -> Tensor | None:
        if batch.embedded is not None or self.config.embedding != "shared":
            return batch.embedded
        return self.embed_tokens(batch.tokens)

    def _head(self, index: int) -> Any:
        return self.lm_head if self.config.embedding == "shared" else self.experts[index].lm_head

    @staticmethod
    def _capped(logits: Tensor, cap: float | None) -> Tensor:
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _logits(
        self,
        batch: Batch,
        coefficients: Tensor,
        cache: SequenceMoECache | None,
        ran: dict[int, Any],
        logits_to_keep: int | Tensor,
        states: DecoderStates,
    ) -> Tensor:
        """What the chosen experts give, added up, as logits at the positions to keep.

        MergeME 3.2 adds up representations, which its head then makes logits of. A head is linear,
        so that this is a sum of logits, weighed by the coefficients: `combine="logits"`. With
        `combine="probabilities"` the experts' probabilities are added up, and these are logarithms.
        """
        shares = cache.shares if cache is not None else []
        if not shares:
            shares = shares_of(coefficients, batch.device)
        positions = _positions_to_keep(logits_to_keep)
        adds_probabilities = self.config.combine == "probabilities"
        # A cap that is the same for all bounds the sum, as that of a model with one head does.
        # Otherwise each expert's logits are capped as its source caps them.
        caps_each = adds_probabilities or len(set(self.config.logit_softcaps)) > 1
        has_one_head = self.config.embedding == "shared" and not caps_each
        runs = shares
        if self.mixed_ffns is not None:
            # One stack runs on all rows, and mixes inside.
            everything = torch.arange(len(coefficients), device=batch.device)
            runs = [Share(0, everything, is_all=True, weights=None)]
        # Each expert runs on the sequences that chose it, and on these alone. A shared head is
        # applied once, to the sum, unless something comes between.
        total: Any = None
        for share in runs:
            with self._mixing(shares, len(coefficients)):
                output = self._output(share, batch, cache, ran, states)[:, positions]
            if not has_one_head:
                output = self._head(share.expert)(output)
            if caps_each:
                output = self._capped(output, self.config.logit_softcaps[share.expert])
            dtype = output.dtype
            if adds_probabilities:
                output = torch.log_softmax(output.float(), dim=-1)
            total = added(total, output, share, len(coefficients), adds_probabilities)
        if cache is not None:
            cache.coefficients = coefficients
            cache.shares = shares
            cache.length += batch.shape[1]
        logits = self.lm_head(total) if has_one_head else total.to(dtype)
        return logits if caps_each else self._capped(logits, self.config.logit_softcaps[0])

    def _mixing(self, shares: list[Share], rows: int) -> AbstractContextManager[None]:
        """A context in which the first expert's FFNs are mixtures, if FFNs are to be mixed."""
        if self.mixed_ffns is None:
            return nullcontext()
        return self.mixed_ffns.running(shares, rows)

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Any = checkpoint,
        **kwargs: Any,
    ) -> None:
        """Switch it as transformers does; a layer that runs again mixes as it did."""
        if self.mixed_ffns is not None:
            gradient_checkpointing_func = partial(
                self.mixed_ffns.checkpoint, gradient_checkpointing_func
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)

    def _output(
        self,
        share: Share,
        batch: Batch,
        cache: SequenceMoECache | None,
        ran: dict[int, Any],
        states: DecoderStates,
    ) -> Tensor:
        """What an expert gives for its rows of the batch, taken from `ran` if it is there.

        Its cache, which a call of the expert fills, goes into `cache`.
        """
        index = share.expert
        of_expert = None
        if index in ran:
            # It ran on all rows, to be chosen; its cache keeps those that chose it.
            output, of_expert = ran.pop(index)
            if not share.is_all:
                output = output[share.rows.to(output.device)]
                if of_expert is not None:
                    select_rows(of_expert, share.rows)
        else:
            if cache is not None:
                _, of_expert = cache.of_expert.get(index, (None, None))
                if of_expert is None:
                    of_expert = cache.new(self.experts[index].trunk.config)
            part = batch if share.is_all else batch.of(share.rows)
            more: dict[str, Any] = {}
            if states.arguments:
                more["outputs"] = states.arguments
                more["take"] = partial(states.take, share.rows, share.weights)
            output = self._run(index, part, of_expert, **more)
        if cache is not None:
            cache.of_expert[index] = share.rows, of_expert
        return output

    def _inputs(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        has_choice: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The tokens, if they are needed or given, and what stands for the shared embedding's.

        Embeddings will do for experts that share one, once there is a choice that predicts nothing.
        Otherwise each has to be that of a token, which is looked up. `ValueError` if it is not.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids= and inputs_embeds=")
        if attention_mask is not None and getattr(attention_mask, "ndim", None) != 2:
            raise ValueError(
                "attention_mask= has to be of shape (rows, tokens): another does not say which "
                "tokens are padding, and padding must not choose"
            )
        if inputs_embeds is None:
            return input_ids, None
        is_shared = self.config.embedding == "shared"
        predicts = self.config.routing in ("perplexity", "task_vector") and not has_choice
        if is_shared and not predicts:
            return None, inputs_embeds
        reason = "each expert of this sequence MoE has an embedding of its own"
        hint = ""
        if is_shared:
            reason = f"routing {self.config.routing!r} predicts the tokens of the prefix"
            hint = ", or coefficients="
        if not is_shared and inputs_embeds.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"inputs_embeds=: {reason}, so that no gradient reaches them: give input_ids="
            )
        padding = self.config.pad_token_id or 0
        embedding = self.get_input_embeddings()
        tokens = tokens_of(inputs_embeds, embedding, attention_mask, padding)
        if tokens is None:
            raise ValueError(
                f"inputs_embeds=: {reason}, so that each has to be what get_input_embeddings() "
                f"makes of one token alone, which these are not: give input_ids={hint}"
            )
        return tokens, inputs_embeds if is_shared else None

    def _checked(self, coefficients: Tensor, rows: int) -> Tensor:
        """The coefficients that were given, a row per sequence. `ValueError` if they do not fit."""
        number = len(self.experts)
        fits = coefficients.ndim == 2 and coefficients.shape[1] == number and len(coefficients) > 0
        if fits and len(coefficients) != rows:
            # One row for all may have been repeated, for beams.
            are_alike = torch.equal(coefficients, coefficients[:1].expand_as(coefficients))
            fits = rows % len(coefficients) == 0 and are_alike
        if not fits:
            raise ValueError(
                f"coefficients are of shape {tuple(coefficients.shape)}; give "
                f"({rows}, {number}), a row per sequence, or (1, {number}) for all"
            )
        if not coefficients.isfinite().all() or not coefficients.any(dim=1).all():
            raise ValueError("coefficients must be finite, and not all 0 for a sequence")
        if self.config.combine == "probabilities" and (coefficients < 0).any():
            raise ValueError("coefficients of probabilities (combine) cannot be negative")
        return coefficients.repeat_interleave(rows // len(coefficients), dim=0)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        *args: Any,
    ) -> Any:
        """Put a cache of our own kind among the arguments; nothing else keeps a choice."""
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation={kind!r}: a sequence MoE keeps its choice in a cache of its "
                "own, which is 'dynamic' or 'static'"
            )
        if generation_config.assistant_early_exit is not None:
            raise ValueError(
                "assistant_early_exit: a sequence MoE has no one stack of layers to leave early; "
                "give assistant_model= or prompt_lookup_num_tokens="
            )
        if generation_config.prefill_chunk_size is not None:
            raise ValueError(
                "prefill_chunk_size: a sequence MoE chooses by the whole prompt; leave it out",
            )
        if generation_config.use_cache is False:
            if model_kwargs.get("coefficients") is None and self.config.routing != "uniform":
                if generation_config.guidance_scale not in (None, 1):
                    raise ValueError(
                        "guidance_scale with use_cache=False: nothing keeps the choice of the "
                        "prompt beside it; leave use_cache out, or give coefficients="
                    )
                model_kwargs[_IS_PROMPT] = True
        elif cache_in(model_kwargs) is None:
            # Static: room for all tokens that this `generate` may come to, from its last argument.
            length = args[-1] if kind == "static" else None
            model_kwargs[OUTPUT_NAME] = SequenceMoECache(length)

    def _update_model_kwargs_for_generation(
        self,
        outputs: Any,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Hand on what transformers does, and without a cache the choice as `coefficients`.

        Each step then passes over everything, and rows stay with their prompts, in beam search too.
        """
        if model_kwargs.pop(_IS_PROMPT, False):
            model_kwargs["coefficients"] = outputs.coefficients
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    # The first pass of assisted decoding goes over the prompt and guesses at what follows, which
    # must not choose. So the prompt is passed over once before, and the choice put into the cache.
    # It is not left among the arguments, all of which transformers hands to the assistant as well.
    @wraps(GenerationMixin._assisted_decoding)
    def _assisted_decoding(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What transformers' own does, the prompt having chosen first."""
        cache = cache_in(kwargs)
        given = kwargs.pop("coefficients", None)
        if isinstance(cache, SequenceMoECache) and cache.coefficients is None:
            if given is None:
                embedded = kwargs.get("inputs_embeds")
                mask = kwargs.get("attention_mask")
                tokens = input_ids if embedded is None else None
                batch = self._batch(tokens, embedded, mask, None, None, None)
                given, _, _ = self._route(batch, self._prefix(batch, whole=True), None)
            cache.coefficients = self._checked(given, len(input_ids))
        return super()._assisted_decoding(input_ids, *args, **kwargs)

    @wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """What transformers' own does, within which a sequence is begun once."""
        with generating(self, kwargs.get("guidance_scale")):
            return super().generate(*args, **kwargs)


class _Comparison:
    """Inner products of a sequence's gradient with base minus expert, and the norms of both.

    They are taken parameter by parameter. Sums are left on their devices until the end, so that a
    GPU need not wait.
    """

    def __init__(self, experts: nn.ModuleList, base: int) -> None:
        self.others = {index: expert for index, expert in enumerate(experts) if index != base}
        self.number = len(experts)
        self.base = experts[base]
        # Squared norms of the differences by expert and parameter: the same for all sequences.
        self.norms: dict[tuple[int, str], Tensor] = {}
        self.start()

    def start(self) -> None:
        """Begin with the next sequence."""
        self.of_gradient: list[Tensor] = []
        self.products: dict[int, list[Tensor]] = {index: [] for index in self.others}

    @torch.no_grad()
    def take(self, name: str, leaf: Tensor) -> None:
        """Take the gradient of the base's parameter of this name, and let it go."""
        assert leaf.grad is not None
        gradient = leaf.grad.flatten().float()
        leaf.grad = None
        self.of_gradient.append(gradient.dot(gradient))
        base = _weight(self.base, name).flatten().float()
        for index, expert in self.others.items():
            difference = base - _weight(expert, name).flatten().to(base)
            self.products[index].append(gradient.dot(difference))
            if (index, name) not in self.norms:
                self.norms[index, name] = difference.dot(difference)

    def cosines(self) -> Tensor:
        """(experts,) in float32; 0 where there is no difference to compare with."""
        cosines = torch.zeros(self.number, dtype=torch.float64, device="cpu")
        for index in self.others:
            norms = [value for (expert, _), value in self.norms.items() if expert == index]
            length = (_sum(norms) * _sum(self.of_gradient)).sqrt()
            if length > 0:
                cosines[index] = _sum(self.products[index]) / length
        return cosines.float()


def _weight(expert: nn.Module, name: str) -> Tensor:
    """The parameter of this name as the expert computes with it: with what PEFT's LoRA adds to it,
    so that a choice is the same before the adapter is merged and after.

    Its module may be wrapped in one expert and not in another.
    """
    path, _, kind = _WRAPPED.sub("", name).rpartition(".")
    layer: Any = expert.get_submodule(path)
    weight: Tensor = getattr(layer, kind)
    is_lora = hasattr(layer, "get_delta_weight") and hasattr(layer, "scaling")
    if kind != "weight" or not is_lora or layer.merged or layer.disable_adapters:
        return weight
    for adapter in layer.active_adapters:
        if adapter in layer.scaling:
            weight = weight + layer.get_delta_weight(adapter).to(weight)
    return weight


def _sum(values: Sequence[Tensor]) -> Tensor:
    """The sum of scalars that lie anywhere, in float64 on the CPU."""
    if not values:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    return torch.stack([value.double().cpu() for value in values]).sum()


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """A context without dropout, so that a choice is not left to chance."""
    in_training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in in_training:
            part.training = True


def _outside_inference(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the parameters that were made or moved in inference mode, by name.

    Autograd refuses such tensors anywhere, also where none of their own gradients is asked for.
    Buffers of the kind are replaced in the module itself, since a forward pass may set them (rotary
    frequencies that grow), which would be lost in a copy.
    """
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if buffer.is_inference():
                setattr(part, name, buffer.clone())
    named = module.named_parameters()
    return {name: each.detach().clone() for name, each in named if each.is_inference()}


def _largest(scores: Tensor, k: int) -> Tensor:
    """The k largest of each row, minus infinity in place of the others."""
    if k == scores.shape[-1]:
        return scores
    values, indices = scores.topk(k, dim=-1)
    return torch.full_like(scores, float("-inf")).scatter(-1, indices, values)


def _positions_to_keep(logits_to_keep: int | Tensor) -> Any:
    """What picks the positions whose logits are asked for: the last ones, all for 0, or these."""
    if isinstance(logits_to_keep, int):
        return slice(-logits_to_keep, None)
    return logits_to_keep


def _positions(
    tokens: Tensor | None,
    embedded: Tensor | None,
    mask: Tensor | None,
    positions: Tensor | None,
) -> Tensor | None:
    """Positions of the tokens, counted without padding; None where every token counts."""
    given: Any = tokens if embedded is None else embedded
    if positions is not None:
        return positions.expand(len(given), -1)
    if mask is None:
        return None
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -given.shape[1] :]


SequenceMoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")
