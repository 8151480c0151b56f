"""`ensemble`: the experts of a routed adapter as an ensemble that generates (Trade-offs 3, B.3).

Every forward pass is one pass per expert, one after the other. Their distributions are mixed in log
space as they come, so that no tensor of (experts, rows, tokens, vocabulary) is made, and one
expert's logits are gone before the next one's. What comes out is logits, on which temperature,
top-p and beam search act as on any model's.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Cache

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.host_cache import FollowingCache, cache_in, following
from peft_routing.choosers.experts import check_known, expert_names
from peft_routing.choosers.prefixes import check_language_model
from peft_routing.given import Given, held
from peft_routing.routers import wide

Of = Literal["probabilities", "logits"]
_NOT_MIXED = ("output_hidden_states", "output_attentions")


class EnsembleCache(FollowingCache):
    """A key-value cache of the first expert that keeps those of the others.

    others: the caches of the other experts, in their order.
    log_weights: (rows, experts), the logarithms of the posterior coefficients, up to a constant;
    None where coefficients are constant.
    last: by expert the logits (rows, vocabulary) of the token to come, in the model's dtype, where
    the coefficients will follow it.
    """

    others: list[Cache]
    log_weights: Tensor | None
    last: list[Tensor]

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.log_weights is not None:
            self.log_weights = change(self.log_weights)
        self.last = [change(each) for each in self.last]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        for cache in self.others:
            cache.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        for cache in self.others:
            cache.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        for cache in self.others:
            cache.batch_select_indices(indices)

    def crop(self, tokens: int) -> None:
        if self.log_weights is not None:
            raise UserError(
                "a posterior ensemble cannot take tokens back: generate without an assistant"
            )
        super().crop(tokens)  # type: ignore[misc]
        for cache in self.others:
            cache.crop(tokens)


class Ensemble:
    """The experts of a model's active routed adapter as one model, which `ensemble` makes.

    experts: those that have a coefficient, by name.
    """

    def __init__(self, model: Any, coefficients: Tensor, of: Of, beta: float) -> None:
        self.model = model
        self._names = expert_names(model)
        self._places = coefficients.nonzero()[:, 0].tolist()
        self._coefficients = coefficients[self._places]
        self._of = of
        self._beta = beta
        self.experts = [self._names[place] for place in self._places]

    @property
    def config(self) -> Any:
        """The configuration of the base model."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the model takes its input."""
        device: torch.device = self.model.device
        return device

    def __call__(self, **batch: Any) -> Any:
        """What the model returns for a batch, with the logits of the mixture (rows, tokens,
        vocabulary) in float32; with `labels`, their mean loss, too.
        """
        labels = batch.pop("labels", None)
        with self.installed():
            output = self.model(**batch)
        if labels is not None:
            shifted = labels[:, 1:].flatten()
            output.loss = functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), shifted)
        return output

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """What `generate` of the model takes and returns, by the mixture.

        Every expert has a key-value cache of the kind that `cache_implementation` names:
        `"offloaded"` keeps them in main memory. With `use_cache=False` there are none.
        """
        with torch.no_grad(), self.installed():
            return self.model.generate(*args, **kwargs)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Has the base model's `forward` be the ensemble's, so that `model` is the ensemble."""
        base = getattr(self.model, "get_base_model", lambda: self.model)()
        forward = base.forward
        before = vars(base).get("forward")  # as of a model that is spread over devices

        @functools.wraps(forward)
        def mixed(*args: Any, **kwargs: Any) -> Any:
            arguments = inspect.signature(forward).bind_partial(*args, **kwargs)
            named = dict(arguments.arguments)
            named |= named.pop("kwargs", {})
            return self._mixed(forward, named)

        base.forward = mixed
        try:
            with held(Given(self._alone(0))):
                yield
        finally:
            if before is None:
                del base.forward
            else:
                base.forward = before

    def _alone(self, number: int) -> Tensor:
        """(all experts,): 1 for one expert, so that it runs alone."""
        place = torch.tensor(self._places[number])
        return functional.one_hot(place, len(self._names)).float()

    def _mixed(self, forward: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """One forward pass of the ensemble."""
        for name in _NOT_MIXED:
            if arguments.get(name):
                raise UserError(f"{name}: an ensemble has only logits; every expert has its own")
        cache = self._cache(cache_in(arguments))
        name_of_cache = next((name for name, value in arguments.items() if value is cache), "")
        asked = arguments.get("logits_to_keep", 0)
        if self._beta:
            if arguments.get("input_ids") is None:
                raise UserError("a posterior ensemble follows input_ids, and there are none")
            arguments["logits_to_keep"] = 0  # those of all new tokens, which the posterior reads
        mixture = _Mixture()
        last = []
        weights = []
        result: Any = None
        for number in range(len(self._places)):
            own = dict(arguments)
            if cache is not None and number:
                own[name_of_cache] = cache.others[number - 1]
            with held(Given(self._alone(number))):
                output = forward(**own)
            logits = output.logits
            log_weight = self._coefficients[number].log().to(logits.device)
            if self._of == "logits":
                mixture.add_logits(logits, log_weight)
            else:
                normalisers = normalisers_of(logits)
                if self._beta:
                    log_weight = self._followed(
                        logits, normalisers, arguments, cache, number, log_weight
                    )
                    last.append(logits[:, -1].clone())
                    weights.append(log_weight[:, -1])
                    logits, normalisers, log_weight = _kept(asked, logits, normalisers, log_weight)
                mixture.add(logits, normalisers, log_weight)
            if result is None:
                result = output
                result.logits = logits[:0].clone()
            # So that no two experts' are in memory.
            del output, logits
        result.logits = mixture.logits
        if cache is not None and self._beta:
            cache.last = last
            cache.log_weights = torch.stack(weights, dim=1)
        return result

    def _cache(self, cache: Cache | None) -> Any:
        """The cache with one per other expert beside it; None where there is none."""
        if cache is None or isinstance(cache, EnsembleCache):
            return cache
        if cache.get_seq_length():
            raise UserError(
                "the key-value cache was filled without the ensemble: give it an empty one, and "
                "leave out guidance_scale, for which generate makes a second one"
            )
        others = [copy.deepcopy(cache) for _ in self._places[1:]]
        followed: Any = cache
        kind: Any = type(cache)
        followed.__class__ = following(kind, EnsembleCache)
        followed.others = others
        followed.log_weights = None
        followed.last = []
        return followed

    def _followed(
        self,
        logits: Tensor,
        normalisers: Tensor,
        arguments: Mapping[str, Any],
        cache: Any,
        number: int,
        prior: Tensor,
    ) -> Tensor:
        """(rows, new tokens): the logarithm of an expert's coefficient after each new token, up to
        what all experts have in common.

        A token counts by the probability that the expert gave it, to the power of beta. The first
        of a text has none, and neither has padding.
        """
        ids = arguments["input_ids"]
        of_tokens = torch.zeros(ids.shape, dtype=normalisers.dtype, device=ids.device)
        chosen = logits[:, :-1].gather(2, ids[:, 1:, None].to(logits.device))
        of_tokens[:, 1:] = wide(chosen[..., 0]) - normalisers[:, :-1]
        before = prior
        if cache is not None and cache.log_weights is not None:
            last = wide(cache.last[number])
            of_tokens[:, 0] = last.gather(1, ids[:, :1])[:, 0] - last.logsumexp(dim=1)
            before = cache.log_weights[:, number, None]
        real = _real(arguments.get("attention_mask"), ids)
        of_tokens = of_tokens.masked_fill(~real, 0)
        return before + self._beta * of_tokens.cumsum(dim=1)


# So many numbers at a time are made float32 and exponentiated: 64 MiB.
_AT_A_TIME = 2**24


def normalisers_of(logits: Tensor) -> Tensor:
    """(rows, tokens): the logarithms of the sums of the exponentials of logits (rows, tokens,
    vocabulary).

    A few tokens at a time, since what is in between is as large as the logits.
    """
    rows, tokens, vocabulary = logits.shape
    parts = logits.reshape(-1, vocabulary).split(max(1, _AT_A_TIME // vocabulary))
    return torch.cat([wide(part).logsumexp(dim=1) for part in parts]).reshape(rows, tokens)


def _kept(asked: Any, *values: Tensor) -> tuple[Tensor, ...]:
    """Of values (rows, tokens, …) those of the tokens that `logits_to_keep` asks for: the last so
    many, all for 0, or those of these places.
    """
    places = asked
    if isinstance(asked, int):
        if asked == 0:
            return values
        places = slice(-asked, None)
    return tuple(each[:, places] for each in values)


def _real(mask: Tensor | None, ids: Tensor) -> Tensor:
    """(rows, new tokens): whether a token and the one before it are no padding."""
    if mask is None:
        return torch.ones_like(ids, dtype=torch.bool)
    if mask.ndim != 2:
        raise UserError(
            "a posterior ensemble reads which tokens are padding from an attention_mask of (rows, "
            f"tokens), not of shape {tuple(mask.shape)}"
        )
    whole = mask.bool()
    with_before = torch.cat([whole[:, :1], whole], dim=1)
    after_real = with_before[:, :-1] & whole
    return after_real[:, -ids.shape[1] :]


class _Mixture:
    """A mixture of experts that come one after the other."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._total: Tensor | None = None  # of the coefficients, as a logarithm

    def add_logits(self, logits: Tensor, log_weight: Tensor) -> None:
        """Adds an expert's logits (rows, tokens, vocabulary) by the logarithm of its
        coefficient.
        """
        added = log_weight.exp() * wide(logits)
        self._sum = added if self._sum is None else self._sum + added

    def add(self, logits: Tensor, normalisers: Tensor, log_weight: Tensor) -> None:
        """Adds an expert's probabilities, by its logits (rows, tokens, vocabulary) and what
        `normalisers_of` gives for them, with the logarithm of its coefficient, one for all or
        (rows, tokens).
        """
        weight = log_weight[..., None]
        added = wide(logits) + (weight - normalisers[..., None])
        if self._sum is None or self._total is None:
            self._sum = added
            self._total = weight
        else:
            self._sum = torch.logaddexp(self._sum, added)
            self._total = torch.logaddexp(self._total, weight)

    @property
    def logits(self) -> Tensor:
        """The logarithms of the mixture's probabilities, or the weighed sum of logits."""
        assert self._sum is not None
        return self._sum if self._total is None else self._sum - self._total


def ensemble(
    model: Any,
    coefficients: Mapping[str, float] | Sequence[float] | Tensor | None = None,
    *,
    of: Of = "probabilities",
    beta: float = 0.0,
) -> Ensemble:
    """The experts of a model's active routed adapter as an ensemble, which runs and generates.

    It takes a forward pass per expert that has a coefficient, and the router has no part in it.
    While it runs, the model is not to be used by another thread.

    Args:
        model: a decoder with one active routed adapter.
        coefficients: of each expert, by name or in the order of the experts, which are scaled to
            sum 1; uniform if None. Those that `compare` has learned are in its report.
        of: mix `probabilities`, or `logits`, which the paper finds worse (B.3).
        beta: above 0 the coefficients follow each text: before a token they are `coefficients`
            times the probability, to the power of beta, that each expert gave to the text so far.
            With 1 that is Bayes' rule. It keeps each expert's last logits, and a prompt's logits
            are made of all its tokens: `prefill_chunk_size` in `generate` bounds them.

    Raises `UserError` for a model that is no decoder or has no routed adapter, and for
    coefficients that are negative, are all 0 or do not fit.

    >>> from peft import PeftModel
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> base = AutoModelForCausalLM.from_pretrained("base")
    >>> mixture = ensemble(PeftModel.from_pretrained(base, "routed"), {"math": 3, "code": 1})
    >>> prompt = AutoTokenizer.from_pretrained("base")("w1 w2", return_tensors="pt")
    >>> mixture.generate(**prompt, max_new_tokens=4, do_sample=False).shape[0]
    1
    """
    check_language_model(model)
    names = expert_names(model)
    if of not in ("probabilities", "logits"):
        raise UserError(f"of={of!r} is neither 'probabilities' nor 'logits'")
    if not 0 <= beta < float("inf"):
        raise UserError(f"beta={beta} is not a number from 0 on")
    if beta and of == "logits":
        raise UserError("beta: a posterior is of probabilities; of='logits' has none")
    if coefficients is None:
        values = torch.ones(len(names))
    elif isinstance(coefficients, Mapping):
        check_known(coefficients, names, "coefficients")
        values = torch.tensor([float(coefficients.get(name, 0.0)) for name in names])
    else:
        values = torch.as_tensor(coefficients).detach().float().cpu()
    if values.shape != (len(names),):
        raise UserError(
            f"coefficients: they are of shape {tuple(values.shape)}, and there are {len(names)} "
            f"experts: {', '.join(names)}"
        )
    if not torch.isfinite(values).all() or (values < 0).any() or not values.any():
        raise UserError(f"coefficients: {values.tolist()} are not numbers from 0 on, some above it")
    return Ensemble(model, values / values.sum(), of, beta)
