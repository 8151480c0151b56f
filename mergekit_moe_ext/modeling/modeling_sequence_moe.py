"""A mixture of whole decoders, of one architecture or of many, of which each sequence chooses some (MergeME).

A choice is made once per sequence, from a prefix: the prompt in `generate`, else the first `routing_tokens` tokens.
The chosen experts run on the sequences that chose them, each with a key-value cache of its own, and what they give is
added up, weighed by the coefficients, before the head. Labels inside the prefix are left out of the loss: there the
choice already knows what is to be predicted.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from transformers import Cache, DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_sequence_moe import SequenceMoEConfig
from .host_cache import OUTPUT_NAME, begin_sequences, cache_in, generating, name_of_cache, with_cache_renamed

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


@dataclass
class SequenceMoEOutput(CausalLMOutputWithPast):
    """What `SequenceMoEForCausalLM` returns.

    `coefficients` (batch, experts): what each sequence chose. `aux_loss`: the load-balancing loss, without its weight.
    """

    coefficients: Tensor | None = None
    aux_loss: Tensor | None = None


class Batch(NamedTuple):
    """Tokens (rows, length), the mask over everything up to them or None, and their positions or None."""

    tokens: Tensor
    mask: Tensor | None
    positions: Tensor | None

    @property
    def real(self) -> Tensor:
        """Which tokens are no padding: (rows, length)."""
        if self.mask is None:
            return torch.ones_like(self.tokens, dtype=torch.bool)
        return self.mask[:, -self.tokens.shape[1] :].bool()

    def of(self, rows: Tensor) -> "Batch":
        return self._each(lambda part: part[rows])

    def until(self, length: int) -> "Batch":
        return self._each(lambda part: part[:, :length])

    def copied(self) -> "Batch":
        return self._each(Tensor.clone)

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        mask, positions = (None if part is None else change(part) for part in (self.mask, self.positions))
        return Batch(change(self.tokens), mask, positions)


class SequenceMoECache(Cache):
    """Per expert a cache of the sequences that chose it, and the choice itself."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.coefficients: Tensor | None = None  # (batch, experts)
        self.of_expert: dict[int, tuple[Tensor, DynamicCache]] = {}  # rows of the batch, and their cache
        self.length = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    @property
    def batch_size(self) -> int:
        return -1 if self.coefficients is None else len(self.coefficients)

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_linear(self) -> list[bool]:
        """Of no layer: from transformers 5.24 a cache without any counts as one that knows no length."""
        return [False]

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError(
            "a sequence MoE cannot take tokens back, as assisted decoding does: its choice is the prompt's"
        )

    def reset(self) -> None:
        self.coefficients, self.of_expert, self.length = None, {}, 0

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.coefficients is None:
            return
        kept = {}
        for expert, (rows, cache) in self.of_expert.items():
            place = torch.full((len(self.coefficients),), -1, device=rows.device)
            place[rows] = torch.arange(len(rows), device=rows.device)
            places = place[indices.to(rows.device)]
            here = places >= 0
            if here.any():
                cache.batch_select_indices(places[here])
                kept[expert] = here.nonzero()[:, 0], cache
        self.of_expert = kept
        self.coefficients = self.coefficients[indices.to(self.coefficients.device)]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.coefficients is not None:
            self.batch_select_indices(torch.arange(len(self.coefficients)).repeat_interleave(repeats))


class Projector(nn.Module):
    """From one width to another (MergeME 3.2)."""

    def __init__(self, kind: str, residual: bool, in_features: int, out_features: int) -> None:
        super().__init__()
        self.out_features, self.residual = out_features, residual
        if kind == "linear":
            self.layers = nn.Sequential(nn.Linear(in_features, out_features, bias=False))
        else:
            width = max(in_features, out_features)
            self.layers = nn.Sequential(
                nn.Linear(in_features, width, bias=False), nn.GELU(), nn.Linear(width, out_features, bias=False)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out)."""
        projected = self.layers(x)
        if not self.residual:
            return projected
        return projected + functional.pad(x[..., : self.out_features], (0, max(0, self.out_features - x.shape[-1])))


class Expert(nn.Module):
    """One decoder, from embeddings to what its head would read.

    The decoder is the source's own class, its embedding and head taken out, so that whatever it does before and after
    its layers (scaling, say) it still does. Its cap on logits is left to the model, which caps mixtures.
    """

    def __init__(self, config: PretrainedConfig, mixture: SequenceMoEConfig) -> None:
        super().__init__()
        self.trunk: Any = getattr(transformers, config.architectures[0])(config)
        embedding, head = self.trunk.get_input_embeddings(), self.trunk.get_output_embeddings()
        self.trunk.set_input_embeddings(None)
        self.trunk.set_output_embeddings(nn.Identity())
        parameters = inspect.signature(self.trunk.forward).parameters
        self.cache_name = name_of_cache(parameters) or OUTPUT_NAME
        self.takes = {"position_ids", "use_cache", self.cache_name} & set(parameters)
        if mixture.embedding == "separate":
            self.embed_tokens, self.lm_head = embedding, head
            return
        self.scale = float(getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", 1.0)))
        if mixture.projector:
            kind, residual, width = mixture.projector, mixture.projector_residual, mixture.hidden_size
            self.proj_in = Projector(kind, residual, width, embedding.embedding_dim)
            self.proj_out = Projector(kind, residual, head.in_features, width)

    def forward(
        self, batch: Batch, shared: Tensor | None = None, cache: Cache | None = None, *, with_head: bool = False
    ) -> Tensor:
        """(rows, length) to (rows, length, width), or to logits by the expert's own head.

        shared: what the shared embedding makes of the tokens, if the expert has none of its own.
        """
        if shared is None:
            x = self.embed_tokens(batch.tokens)
        else:
            x = shared
            if hasattr(self, "proj_in"):
                x = self.proj_in(x)
            if self.scale != 1:
                x = x * torch.tensor(self.scale, dtype=x.dtype, device=x.device)
        more = {"position_ids": batch.positions, self.cache_name: cache, "use_cache": cache is not None}
        y = self.trunk(
            inputs_embeds=x, attention_mask=batch.mask, **{name: more[name] for name in sorted(self.takes)}
        ).logits
        if hasattr(self, "proj_out"):
            y = self.proj_out(y)
        return self.lm_head(y) if with_head else y


class SequenceMoEForCausalLM(PreTrainedModel, GenerationMixin):
    """Whole decoders as experts, chosen per sequence."""

    config_class = SequenceMoEConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _is_stateful = True  # assisted decoding is refused by transformers

    def __init__(self, config: SequenceMoEConfig) -> None:
        super().__init__(config)
        configs = config.expert_configs()
        for of_expert in configs:
            if config._attn_implementation not in (None, "sdpa"):  # sdpa is only the default, which some refuse
                of_expert._attn_implementation = config._attn_implementation
        self.experts: Any = nn.ModuleList(Expert(of_expert, config) for of_expert in configs)
        if config.embedding == "shared":
            self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.head_bias)
        if config.routing == "learned":
            width = self.get_input_embeddings().embedding_dim
            self.router: Any = nn.Linear(width, len(configs), bias=False)
        for name in _TAKEN_FROM_TRUNKS:
            setattr(self, name, {item for expert in self.experts for item in getattr(expert.trunk, name) or ()})
        self._tied_weights_keys = self.get_expanded_tied_weights_keys()  # save_pretrained looks here
        self.post_init()

    def get_input_embeddings(self) -> Any:
        """The shared embedding; the base expert's, where each has its own."""
        if self.config.embedding == "shared":
            return self.embed_tokens
        return self.experts[self.config.base_expert].embed_tokens

    def get_output_embeddings(self) -> Any:
        if self.config.embedding == "shared":
            return self.lm_head
        return self.experts[self.config.base_expert].lm_head

    def _init_weights(self, module: nn.Module) -> None:
        """Embeddings and heads that were taken out of a decoder start as that decoder says (Gemma's scale, say)."""
        for expert in self.experts:
            if module in (getattr(expert, "embed_tokens", None), getattr(expert, "lm_head", None)):
                expert.trunk._init_weights(module)
                return
        super()._init_weights(module)

    def _adjust_bias(self, *args: Any) -> None:
        """Nothing: tying would pad the bias beside a tied weight, as of a head that grew, and spoil GPT-2's layers."""

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("a sequence MoE keeps its vocabulary: change that of the sources, and merge again")

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """What is stored once, by the names of its copies: heads tied to embeddings, and what experts share."""
        patterns = [re.compile(pattern) for pattern in self.config.shared_parameters]
        names = [name for name, _ in self.named_parameters(remove_duplicate=False)]
        first = "experts.0.trunk."
        tied = {}
        for name in names:
            _, index, inner, of_trunk = [*name.split(".", 3), "", "", ""][:4]
            if inner == "trunk" and index != "0" and any(pattern.search(of_trunk) for pattern in patterns):
                tied[name] = first + of_trunk
            own_tied = name.endswith("lm_head.weight") and inner == "lm_head" and self._is_tied(int(index))
            if own_tied:
                tied[name] = f"experts.{index}.embed_tokens.weight"
        if self.config.embedding == "shared" and self.config.tie_word_embeddings:
            tied["lm_head.weight"] = "embed_tokens.weight"
        return tied

    def _is_tied(self, expert: int) -> bool:
        return bool(self.experts[expert].trunk.config.tie_word_embeddings)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: SequenceMoECache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        coefficients: Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits, and the loss over `labels` outside the prefix.

        coefficients (batch, experts), or (1, experts): how much each expert counts, instead of a choice; those with 0
        are not run. `past_key_values=` is the cache's name in transformers before 5.24, and is taken too.
        """
        if kwargs.get("output_hidden_states") or kwargs.get("output_attentions"):
            raise ValueError("a sequence MoE has no hidden states or attentions of its own: ask one of model.experts")
        kwargs = with_cache_renamed({**kwargs, "cache": cache}, {"cache": cache})
        cache = kwargs.pop("cache")
        if cache is not None and not isinstance(cache, SequenceMoECache):
            raise ValueError(f"the cache is a {type(cache).__name__}; a sequence MoE needs a SequenceMoECache()")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        batch = Batch(input_ids, attention_mask, _positions(input_ids, attention_mask, position_ids))
        aux_loss: Tensor | None = None
        ran: dict[int, Any] = {}
        if cache is not None and cache.coefficients is not None:
            coefficients = cache.coefficients
        elif coefficients is not None:
            coefficients = self._checked(coefficients, input_ids)
        else:
            if self.config.routing != "uniform":  # which chooses nothing, so that a cache need not come back
                begin_sequences(self)
            prefix = self._prefix(batch, whole=cache is not None)
            coefficients, aux_loss, ran = self._route(batch, prefix, keep=cache is not None or use_cache)
            labels, kwargs = self._without_prefix(labels, prefix, kwargs)
        if cache is None and use_cache:
            cache = SequenceMoECache()
        logits = self._logits(batch, coefficients, cache, ran, logits_to_keep)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
            if aux_loss is not None and self.training:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        output = SequenceMoEOutput(
            loss=loss, logits=logits, coefficients=coefficients, aux_loss=aux_loss, **{OUTPUT_NAME: cache}
        )
        return output if return_dict is not False else output.to_tuple()

    def _prefix(self, batch: Batch, *, whole: bool) -> Tensor:
        """Which tokens choose: (batch, length)."""
        if whole or self.config.routing_prefix == "sequence":
            return batch.real
        return batch.real & (batch.real.cumsum(dim=1) <= self.config.routing_tokens)

    def _without_prefix(self, labels: Tensor | None, prefix: Tensor, kwargs: dict[str, Any]) -> Any:
        """Labels outside the prefix, and as many fewer items where the Trainer has counted them beforehand."""
        if labels is None or self.config.routing == "uniform" or self.config.routing_prefix == "sequence":
            return labels, kwargs
        kept = labels.masked_fill(prefix.to(labels.device), -100)
        items = kwargs.get("num_items_in_batch")
        if items is not None:
            after, before = ((part[:, 1:] != -100).sum().clamp(min=1) for part in (kept, labels))
            kwargs = {**kwargs, "num_items_in_batch": items * after / before}
        return kept, kwargs

    def _route(self, batch: Batch, prefix: Tensor, *, keep: bool) -> tuple[Tensor, Tensor | None, dict[int, Any]]:
        """Coefficients (batch, experts), the load-balancing loss, and what ran already for all of the batch."""
        number, k = len(self.experts), self.config.experts_per_sequence
        aux_loss: Tensor | None = None
        ran: dict[int, Any] = {}
        if self.config.routing == "uniform":
            scores = torch.zeros(len(prefix), number, device=prefix.device)
        elif self.config.routing == "learned":
            if self.training and k == 1 < number and self.router.weight.requires_grad:
                raise ValueError(
                    "a router that keeps one expert gets no gradient, since the softmax over one is always 1: set "
                    "experts_per_sequence to 2 or more, or freeze the router"
                )
            embedded = self.get_input_embeddings()(batch.tokens)
            total = torch.where(prefix[..., None], embedded, 0).sum(dim=1)
            mean = total / prefix.sum(dim=1, keepdim=True).clamp(min=1)
            scores = self.router(mean.to(self.router.weight.dtype)).float()
        elif self.config.routing == "perplexity":
            reuse = not self.training and not torch.is_grad_enabled()
            scores, ran = self._inverse_perplexities(batch, prefix, keep=keep, reuse=reuse)
        else:
            scores = self._task_vector_similarities(batch, prefix)
        coefficients = torch.softmax(_largest(scores, k), dim=-1)
        if self.config.routing in ("perplexity", "task_vector"):  # nothing to choose by: all alike
            blind = ~self._scored(batch, prefix).any(dim=1, keepdim=True)
            coefficients = torch.where(blind.to(coefficients.device), self._without_choice(coefficients), coefficients)
        if self.config.routing == "learned" and self.training:
            chosen = (coefficients > 0).float().mean(dim=0) / k
            aux_loss = number * (chosen * torch.softmax(scores, dim=-1).mean(dim=0)).sum()
        return coefficients, aux_loss, ran

    def _without_choice(self, like: Tensor) -> Tensor:
        """All experts alike; where they cap their logits differently and so cannot be mixed, the base alone."""
        if len(set(self.config.logit_softcaps)) > 1:
            alone = torch.zeros_like(like)
            alone[:, self.config.base_expert] = 1
            return alone
        return torch.full_like(like, 1 / len(self.experts))

    def _scored(self, batch: Batch, prefix: Tensor) -> Tensor:
        """Which tokens of the prefix a heuristic predicts: no padding, no special tokens, none after padding."""
        special = torch.tensor(self.config.special_token_ids, device=batch.tokens.device)
        scored = prefix & ~torch.isin(batch.tokens, special)
        before = functional.pad(batch.real[:, :-1], (1, 0))
        return scored & before

    @torch.no_grad()
    def _inverse_perplexities(
        self, batch: Batch, prefix: Tensor, *, keep: bool, reuse: bool
    ) -> tuple[Tensor, dict[int, Any]]:
        """1 / PPL(x | expert) of the prefix: (batch, experts) in float32.

        And what the experts gave, with their caches if `keep`, if it was everything and is of `reuse`.
        """
        length = int(prefix.any(dim=0).nonzero().max()) + 1 if prefix.any() else 0
        scored = self._scored(batch, prefix)[:, :length]
        is_whole = reuse and length == batch.tokens.shape[1]
        rows, columns = scored.nonzero(as_tuple=True)
        targets = batch.tokens[rows, columns]
        scores, ran = [], {}
        for index, expert in enumerate(self.experts):
            cache = DynamicCache(config=expert.trunk.config) if keep and is_whole else None
            with _evaluating(expert):
                output = self._run(index, batch.until(length), cache)
            losses = torch.zeros(scored.shape, device=scored.device)
            for part in torch.arange(len(rows), device=rows.device).split(_SCORED_AT_ONCE):
                hidden = output[rows[part].to(output.device), columns[part].to(output.device) - 1]
                logits = self._capped(self._head(index)(hidden), self.config.logit_softcaps[index]).float()
                loss = functional.cross_entropy(logits, targets[part].to(logits.device), reduction="none")
                losses[rows[part], columns[part]] = loss.to(losses.device)
            scores.append(torch.exp(-losses.sum(dim=1) / scored.sum(dim=1).clamp(min=1)))
            if is_whole:
                ran[index] = output, cache
        return torch.stack(scores, dim=-1).nan_to_num(0.0), ran

    def _task_vector_similarities(self, batch: Batch, prefix: Tensor) -> Tensor:
        """Cosine of the gradient at the base expert with base minus expert: (batch, experts) in float32; the base 0.

        Over the parameters that experts have of their own. Gradients are compared and let go as they come, parameter
        by parameter.
        """
        base = self.experts[self.config.base_expert]
        names = [name for name, _ in base.named_parameters() if self._is_compared(name)]
        scored = self._scored(batch, prefix)
        compared, similarities = _Comparison(self.experts, self.config.base_expert), []
        with torch.inference_mode(False), torch.enable_grad(), _evaluating(base):
            for row in range(len(batch.tokens)):
                compared.start()
                leaves = {name: base.get_parameter(name).detach().requires_grad_() for name in names}
                for name, leaf in leaves.items():
                    leaf.register_post_accumulate_grad_hook(partial(compared.take, name))
                one = batch.of(torch.tensor([row], device=batch.tokens.device)).copied()
                if scored[row].any():
                    loss = self._loss_at_base(base, leaves, one, scored[row].clone())
                    loss.backward(inputs=list(leaves.values()))
                similarities.append(compared.cosines())
        return torch.stack(similarities).to(batch.tokens.device)

    def _is_compared(self, name: str) -> bool:
        inner = name.removeprefix("trunk.")
        if any(re.search(pattern, inner) for pattern in self.config.shared_parameters):
            return False
        layers = self.config.task_vector_layers
        layer = _LAYER.search(inner)
        return layers is None or (layer is not None and int(layer[1]) in layers)

    def _loss_at_base(self, base: nn.Module, leaves: dict[str, Tensor], one: Batch, scored: Tensor) -> Tensor:
        shared = self._embedded(one)
        if shared is None:
            logits = functional_call(base, leaves, (one,), {"with_head": True})
        else:
            logits = self.lm_head(functional_call(base, leaves, (one, shared)))
        logits = self._capped(logits, self.config.logit_softcaps[self.config.base_expert])
        columns = scored.nonzero()[:, 0].to(logits.device)
        return functional.cross_entropy(logits[0, columns - 1].float(), one.tokens[0, columns.to(one.tokens.device)])

    def _run(self, index: int, batch: Batch, cache: Cache | None) -> Tensor:
        return self.experts[index](batch, self._embedded(batch), cache)

    def _embedded(self, batch: Batch) -> Tensor | None:
        return self.embed_tokens(batch.tokens) if self.config.embedding == "shared" else None

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
    ) -> Tensor:
        """What the chosen experts give, added up, as logits at the positions to keep."""
        caps = {self.config.logit_softcaps[index] for index in _chosen(coefficients)}
        if len(caps) > 1 and ((coefficients != 0).sum(dim=-1) > 1).any():
            raise ValueError(f"experts that cap their logits differently ({caps}) cannot be mixed: choose one")
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        heads_at_once = self.config.embedding == "shared"
        total: Any = None
        for index in _chosen(coefficients):
            rows = coefficients[:, index].nonzero()[:, 0].to(batch.tokens.device)
            output = self._output(index, rows, batch, cache, ran)[:, positions]
            if not heads_at_once:
                output = self.experts[index].lm_head(output)
            if total is None:
                total = output.new_zeros(len(coefficients), *output.shape[1:])
            weights = coefficients[rows.to(coefficients.device), index].to(total)[:, None, None]
            total = total.index_add(0, rows.to(total.device), weights * output.to(total))
        if cache is not None:
            cache.coefficients = coefficients
            cache.length += batch.tokens.shape[1]
        logits = self.lm_head(total) if heads_at_once else total
        if len(caps) == 1:
            return self._capped(logits, caps.pop())
        each = [self.config.logit_softcaps[index] for index in coefficients.abs().argmax(dim=-1).tolist()]
        return torch.stack([self._capped(row, cap) for row, cap in zip(logits, each, strict=True)])

    def _output(
        self, index: int, rows: Tensor, batch: Batch, cache: SequenceMoECache | None, ran: dict[int, Any]
    ) -> Tensor:
        if index in ran:
            output, of_expert = ran.pop(index)
            output = output[rows.to(output.device)]
            if of_expert is not None and len(rows) < len(batch.tokens):
                of_expert.batch_select_indices(rows)
        else:
            of_expert = None
            if cache is not None:
                known = cache.of_expert.get(index)
                of_expert = known[1] if known else DynamicCache(config=self.experts[index].trunk.config)
            output = self._run(index, batch if len(rows) == len(batch.tokens) else batch.of(rows), of_expert)
        if cache is not None:
            cache.of_expert[index] = rows, of_expert
        return output

    def _checked(self, coefficients: Tensor, tokens: Tensor) -> Tensor:
        """Given coefficients, one row per sequence."""
        number = len(self.experts)
        fits = coefficients.ndim == 2 and coefficients.shape[1] == number and len(coefficients) > 0
        if not fits or len(tokens) % len(coefficients):
            raise ValueError(
                f"coefficients are of shape {tuple(coefficients.shape)}; give ({len(tokens)}, {number}), a row per "
                f"sequence, or (1, {number}) for all"
            )
        if not coefficients.isfinite().all() or not coefficients.any(dim=1).all():
            raise ValueError("coefficients must be finite, and not all 0 for a sequence")
        return coefficients.repeat_interleave(len(tokens) // len(coefficients), dim=0)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any) -> Any:
        """Of our own kind; nothing else keeps a choice."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r}: a sequence MoE keeps its choice in "
                "a cache of its own; leave it out"
            )
        if generation_config.prefill_chunk_size is not None:
            raise ValueError("prefill_chunk_size: a sequence MoE chooses by the whole prompt; leave it out")
        if generation_config.use_cache is False:
            if model_kwargs.get("coefficients") is None and self.config.routing != "uniform":
                raise ValueError("use_cache=False: a sequence MoE keeps its choice in the cache; give coefficients=")
        elif cache_in(model_kwargs) is None:
            model_kwargs[OUTPUT_NAME] = SequenceMoECache()

    @wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own, in which a sequence is begun once."""
        with generating(self):
            return super().generate(*args, **kwargs)


class _Comparison:
    """Inner products of a sequence's gradient with base minus expert, and the norms of both, parameter by parameter.

    Sums are left on their devices until the end, so that a GPU need not wait.
    """

    def __init__(self, experts: nn.ModuleList, base: int) -> None:
        self.others = {index: expert for index, expert in enumerate(experts) if index != base}
        self.number, self.base = len(experts), experts[base]
        self.norms: dict[tuple[int, str], Tensor] = {}  # of the differences: the same for all sequences
        self.start()

    def start(self) -> None:
        """With the next sequence."""
        self.of_gradient: list[Tensor] = []
        self.products: dict[int, list[Tensor]] = {index: [] for index in self.others}

    @torch.no_grad()
    def take(self, name: str, leaf: Tensor) -> None:
        assert leaf.grad is not None
        gradient, leaf.grad = leaf.grad.flatten().float(), None
        self.of_gradient.append(gradient.dot(gradient))
        base = self.base.get_parameter(name).flatten().float()
        for index, expert in self.others.items():
            difference = base - expert.get_parameter(name).flatten().to(base)
            self.products[index].append(gradient.dot(difference))
            if (index, name) not in self.norms:
                self.norms[index, name] = difference.dot(difference)

    def cosines(self) -> Tensor:
        """(experts,) in float32; 0 where there is no difference to compare with."""
        cosines = torch.zeros(self.number, dtype=torch.float64)
        for index in self.others:
            norm = _sum(value for (of, _), value in self.norms.items() if of == index)
            length = (norm * _sum(self.of_gradient)).sqrt()
            if length > 0:
                cosines[index] = _sum(self.products[index]) / length
        return cosines.float()


def _sum(values: Iterable[Tensor]) -> Tensor:
    """Of scalars anywhere, in float64 on the CPU."""
    parts = list(values)
    return (
        torch.stack([part.double().cpu() for part in parts]).sum() if parts else torch.zeros((), dtype=torch.float64)
    )


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Without dropout, so that a choice is no game of chance."""
    in_training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        yield
    finally:
        for part in in_training:
            part.training = True


def _chosen(coefficients: Tensor) -> list[int]:
    return coefficients.any(dim=0).nonzero()[:, 0].tolist()


def _largest(scores: Tensor, k: int) -> Tensor:
    """The k largest of each row, minus infinity in place of the others."""
    if k == scores.shape[-1]:
        return scores
    values, indices = scores.topk(k, dim=-1)
    return torch.full_like(scores, float("-inf")).scatter(-1, indices, values)


def _positions(tokens: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor | None:
    """Of the tokens, counted without padding."""
    if positions is not None:
        return positions.expand(len(tokens), -1)
    if mask is None:
        return None
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]


SequenceMoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")
