"""What a module must know of the forward pass it is in: padding, prefix and cache.

A coefficient that holds for a whole sequence comes from a prefix alone: the prompt where a cache is
filled (`generate`), else the first `routing_tokens` tokens of a decoder. It is kept with the cache
that it belongs to. A model that does not generate (an encoder, a classifier, a vision model) is
routed by the whole input, and so is the part of a model that reads images or sound beside a text:
the text's mask says nothing of its tokens. `hooks` starts and ends these passes.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.host_cache import (
    FollowingCache,
    begin_sequences,
    cache_in,
    following,
    is_generating,
    refuse_other_caches,
)
from peft_routing.balance import Balance
from peft_routing.packing import documents_in, means_of, places_in, starts_again
from peft_routing.routers import over_tokens, wide

Reads = Literal["text", "media", "either"]
_NO_CACHE = "routing per sequence keeps its choice with a key-value cache, which this model has not"
_INPUTS = (
    "input_ids",
    "inputs_embeds",
    "pixel_values",
    "input_values",
    "input_features",
    "decoder_input_ids",
    "decoder_inputs_embeds",
)
_MEDIA = ("pixel_values", "pixel_values_videos", "input_values", "input_features")
# What else than position_ids may say where the documents of a packed row begin.
_SIGNS_OF_PACKING = ("seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")


class RoutedCache(FollowingCache):
    """A cache that carries the coefficients (rows, experts) of its rows, by adapter and router."""

    routed_lora: dict[tuple[str, str], Tensor]

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.routed_lora = {key: change(rows) for key, rows in self.routed_lora.items()}


class RoutedCall:
    """One forward pass of the whole model."""

    def __init__(
        self,
        model: Any,
        arguments: dict[str, Any],
        *,
        per_sequence: bool,
        balance_weight: float,
        outer: "RoutedCall | None",
    ) -> None:
        self.model = model
        self.outer = outer
        self.balance = Balance(balance_weight)
        config = getattr(model, "config", None)
        self._training = model.training
        self._is_encoder_decoder = getattr(config, "is_encoder_decoder", False)
        self._mask = arguments.get("attention_mask")
        self._position_ids = arguments.get("position_ids")
        self._signs_of_packing = [
            name for name in _SIGNS_OF_PACKING if arguments.get(name) is not None
        ]
        self._predicts_tokens = hasattr(model, "can_generate") and model.can_generate()
        example = input_in(arguments)
        self._batch_size = None if example is None else len(example)
        # Of the text of a model that reads images or sound beside it, (batch, length).
        self._text_shape = _text_shape(model, arguments)
        self._media = [arguments[name] for name in _MEDIA if arguments.get(name) is not None]
        self._has_begun = False
        self._chosen: dict[tuple[str, str], Tensor] = {}
        self._known_documents: dict[Any, Tensor | None] = {}
        if per_sequence:
            refuse_other_caches(arguments)
        self._cache: Any = cache_in(arguments) if per_sequence else None
        self._keeps_no_cache = arguments.get("use_cache") is False
        self._state_space = _knows_no_length(self._cache)
        if self._state_space:
            self._cache = None
        # An empty cache is about to be filled by the prompt. Classifier-free guidance runs a prompt
        # of its own within `generate`, and has the model make the cache.
        if self._cache is not None:
            self._is_prompt = bool(self._cache.get_seq_length() == 0)  # a tensor's, if static
        else:
            makes_cache = per_sequence and arguments.get("use_cache") is True
            self._is_prompt = makes_cache and is_generating(model)
        # `generate` without a cache: every step goes over prompt and answer, and asks for the last
        # logits alone. A training pass does not.
        has_no_cache = self._cache is None and arguments.get("use_cache") is False
        self._grows_without_cache = has_no_cache and "logits_to_keep" in arguments

    def choose(self, router: Any, x: Tensor, adapter: str, reads: Reads = "text") -> Tensor:
        """The coefficients (…, experts) of a router that depends on its input x.

        `reads` is what `reads_of` says of its module. They can be broadcast over the tokens of x.
        `UserError` where a choice per sequence cannot be made, or was not made for the sequences of
        the cache.
        """
        key = adapter, router.group
        documents = None
        is_of_text = reads == "text" or (reads == "either" and not self._is_beside_text(x))
        if router.granularity == "token":
            scores = router.scores(x)
        elif not is_of_text:
            self._check_media(x)
            scores = _means_of_whole(router, x)
        elif self._cache is not None and not self._is_prompt:
            # A later step of `generate`: the prompt chose, and its choice lies with the cache, not
            # with the module, which other sequences may have passed through in between.
            return over_tokens(self._carried(key, x), x)
        else:
            self._begin()
            documents = self._documents(x)
            chosen = self._prefix(x, documents, router.routing_tokens)
            scores = _means(router.scores(x), documents, chosen)
        coefficients = router.coefficients(scores)
        # No step of a generation comes back to an image.
        if self._is_prompt and router.granularity == "sequence" and is_of_text:
            self._chosen[key] = coefficients
        if router.is_balanced and self._training:
            imbalance = self._imbalance(router, scores, is_of_text)
            coefficients = self.balance.with_gradient(coefficients, imbalance)
        if router.granularity == "token":
            return coefficients
        return over_tokens(coefficients, x) if documents is None else coefficients[documents]

    def _is_beside_text(self, x: Tensor) -> bool:
        """Whether the tokens of x (batch, length, …) are not those of the text."""
        return self._text_shape is not None and x.ndim > 2 and x.shape[:2] != self._text_shape

    def _check_media(self, x: Tensor) -> None:
        """`UserError` where x has other rows than there are images: windows of them, say."""
        counts = set()
        for each in self._media:
            counts |= {len(each), each.shape[:2].numel()}  # images, or several in each row
        if counts and len(x) not in counts:
            _refuse_media(x)

    def _carried(self, key: tuple[str, str], x: Tensor) -> Tensor:
        """What the sequences of the cache chose, (batch, experts)."""
        known = self._cache.routed_lora if isinstance(self._cache, RoutedCache) else {}
        if key not in known:
            raise UserError(
                "there are no coefficients for the sequences of this cache: start with an "
                "empty one of your own, past_key_values=DynamicCache(config=model.config), "
                "with this adapter active"
            )
        if len(known[key]) != len(x):
            raise UserError(
                f"the cache has coefficients for {len(known[key])} sequences, and the batch has "
                f"{len(x)}. Select or repeat a cache's rows by its own methods, which take the "
                "coefficients along (batch_select_indices, batch_repeat_interleave, reorder_cache)"
            )
        return known[key]

    def _begin(self) -> None:
        """`RuntimeError` where the same generation chose for its sequences in an earlier pass."""
        # A pass of somebody's own that says use_cache=False is no step of a generation.
        if not self._has_begun and not self._keeps_no_cache:
            begin_sequences(self.model)
        self._has_begun = True

    def _documents(self, x: Tensor) -> Tensor | None:
        """The document of each token of x (batch, length, …); None where a row is one document."""
        # The same for every module, and a GPU would be waited for each time.
        key = x.shape[:2], x.ndim, x.device
        if key not in self._known_documents:
            self._known_documents[key] = self._documents_by_positions(x)
        return self._known_documents[key]

    def _documents_by_positions(self, x: Tensor) -> Tensor | None:
        positions = self._position_ids
        if positions is None and self._signs_of_packing:
            raise UserError(
                f"{self._signs_of_packing[0]}: routing per sequence tells packed documents apart "
                "by position_ids that start again: give these too (DataCollatorWithFlattening "
                "makes them), or use granularity='token'"
            )
        # Some models have positions in several dimensions, or modules that see other tokens.
        if not isinstance(positions, Tensor) or positions.ndim != 2 or x.ndim != 3:
            return None
        if positions.shape[1] != x.shape[1] or len(positions) not in (1, len(x)):
            return None
        positions = positions.to(x.device).expand(len(x), -1)
        # transformers' attention takes documents for one sequence wherever a mask or a cache is
        # given, and then they are not independent of one another, whatever is routed.
        if self._mask is None and not self._is_prompt:
            return documents_in(positions)
        if starts_again(positions, self._real(x)):
            raise UserError(
                "position_ids start again within a row, and packed documents are kept apart only "
                "without an attention_mask and without a cache: leave these out, or give each "
                "document a row"
            )
        return None

    # Where a cache is filled the whole input is a prompt, and what is predicted comes later. A
    # plain pass of a decoder goes over prompt and answer at once: only a part that is fixed in
    # advance may choose there, or the choice would know the answer.
    def _prefix(
        self,
        x: Tensor,
        documents: Tensor | None,
        routing_tokens: int,
    ) -> Tensor | None:
        """Which tokens of x (batch, length, …) choose: (batch, length), or None for all of them."""
        if self._grows_without_cache:
            raise UserError(
                "routing per sequence keeps its choice with the cache: generate with "
                "use_cache=True, and leave logits_to_keep out of a pass without one"
            )
        if self._state_space:
            raise UserError(_NO_CACHE)
        if self._batch_size is not None and len(x) != self._batch_size:
            raise UserError(
                f"cannot tell the sequences apart in an input of shape {tuple(x.shape)} with "
                f"{self._batch_size} sequences: use granularity='token'"
            )
        if x.ndim != 3:
            return None
        real = self._real(x)
        if not self._predicts_tokens or self._is_prompt:
            return real
        if documents is not None:
            return places_in(documents) < routing_tokens
        if real is None:
            real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return real & (real.cumsum(dim=1) <= routing_tokens)

    def prefix_of_labels(self, labels: Tensor, routing_tokens: int) -> Tensor | None:
        """Which labels (batch, length) are of tokens that choose; None where none is to go."""
        if not self._predicts_tokens or labels.ndim != 2:
            return None
        each = labels[..., None]
        return self._prefix(each, self._documents(each), routing_tokens)

    def _real(self, x: Tensor) -> Tensor | None:
        """Which tokens of x (batch, length, …) are not padding; None for all of them."""
        if self._mask is None or (self._is_encoder_decoder and self._mask.shape != x.shape[:2]):
            return None  # the mask is the encoder's
        mask = self._mask
        # Layers of several kinds have a mask each, which leave out the same padding.
        if isinstance(mask, dict):
            mask = next(iter(mask.values()), None)
        # A model of sound that has a mask of samples knows which of its frames they make.
        frames = getattr(self.model, "_get_feature_vector_attention_mask", None)
        if frames is not None and isinstance(mask, Tensor) and mask.ndim == 2:
            mask = frames(x.shape[1], mask)
        if isinstance(mask, Tensor) and mask.shape == x.shape[:2]:
            return mask.bool().to(x.device)
        # For a static cache `generate` makes (batch, 1, tokens, places in the cache) of the mask.
        # No token sees padding, not even from the same place, and every other token sees itself.
        is_of_prompt = isinstance(mask, Tensor) and mask.ndim == 4 and self._is_prompt
        if is_of_prompt and is_generating(self.model) and mask.shape[2] == x.shape[1]:
            sees_itself = mask[:, 0].diagonal(dim1=-2, dim2=-1)
            real = sees_itself if mask.dtype == torch.bool else sees_itself == 0
            return real.expand(len(x), -1).to(x.device)
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UserError(
            "routing needs an attention mask of shape (batch, tokens) to leave out padding: "
            f"{tuple(x.shape[:2])} for this module's input; it is {shape}"
        )

    def _imbalance(self, router: Any, scores: Tensor, is_of_text: bool) -> Tensor:
        """n sum of f_i P_i, a scalar: 1 at balance, more where few experts are chosen."""
        # f is how often an expert was chosen, P its probability, both averaged over tokens. Only P
        # has a gradient: it falls for experts that are chosen much. Padding is not counted.
        probabilities = router.probabilities(scores)
        chosen = router.load(scores).detach()
        # Images have no padding, nor have relative positions, which are no rows of the batch.
        is_masked = is_of_text and self._batch_size in (None, len(scores))
        if router.granularity == "token" and scores.ndim == 3 and is_masked:
            real = self._real(scores)
            if real is not None:
                probabilities = probabilities[real]
                chosen = chosen[real]
        mean_probability = probabilities.flatten(0, -2).mean(dim=0)
        frequency = chosen.flatten(0, -2).mean(dim=0)
        return (mean_probability * frequency).sum() * scores.shape[-1]

    def end(self, output: Any) -> None:
        """Leave the choice with the cache of a prompt. `UserError` if the model did not fill it."""
        if not self._is_prompt:
            return
        filled: Any = cache_in(output) if self._cache is None else self._cache
        if filled is None:
            return  # if `generate` goes on, `begin_sequences` tells
        if filled.get_seq_length() == 0:
            raise UserError(_NO_CACHE)
        if not isinstance(filled, RoutedCache):
            kind: Any = type(filled)
            filled.__class__ = following(kind, RoutedCache)
        # What another sequence chose with this cache object, before it was reset, is forgotten.
        filled.routed_lora = self._chosen


def _means(scores: Tensor, documents: Tensor | None, chosen: Tensor | None) -> Tensor:
    """The means of scores (batch, …, n) over the chosen tokens, in float32 or wider.

    They are (batch, n), or (documents, n) where rows are packed.
    """
    scores = wide(scores)
    if documents is not None:
        return means_of(documents, scores, chosen)
    if scores.ndim == 2:
        return scores
    if chosen is None:
        return scores.flatten(1, -2).mean(dim=1)
    # Not scores * chosen: what is left out may be infinite or NaN.
    total = torch.where(chosen[..., None], scores, 0).sum(dim=1)
    return total / chosen.sum(dim=1, keepdim=True).clamp(min=1)


def _means_of_whole(router: Any, x: Tensor) -> Tensor:
    """The means of a router's scores over all tokens of each image in x (images, tokens, …)."""
    if x.ndim != 3:
        _refuse_media(x)
    return _means(router.scores(x), None, None)


def _refuse_media(x: Tensor) -> NoReturn:
    raise UserError(
        f"cannot tell the images, or pieces of sound, apart in an input of shape {tuple(x.shape)}: "
        "use granularity='token', or experts without an update in the part that reads them"
    )


CALL: ContextVar[RoutedCall | None] = ContextVar("peft_routing_call", default=None)


def coefficients_at(layer: Any, router: Any, x: Tensor, adapter: str) -> Tensor:
    """The coefficients that the router of an adapter gives to the input x of a layer.

    They are (experts,), or (…, experts) to be broadcast over the tokens of x. `RuntimeError` where
    routing is per sequence, and a part of the model is called alone.
    """
    if not router.depends_on_input:
        return router(x).to(x.device)  # a router of several modules may lie on another device
    choice = router.choice
    if choice is None:
        return _chosen_by(layer, router, x, adapter)
    now = choice.now
    if now.coefficients is None:
        choice.check_reader(router, x, layer.key)
        now.coefficients = _chosen_by(layer, router, x, adapter)
    return choice.over(x, layer.key, router.granularity)


def _chosen_by(layer: Any, router: Any, x: Tensor, adapter: str) -> Tensor:
    """What a router that depends on its input x chooses; see `coefficients_at`."""
    is_balanced = router.is_balanced and router.training
    if router.granularity == "token" and not is_balanced:
        return router(x)
    call = CALL.get()
    if call is not None:
        return call.choose(router, x, adapter, layer.reads)
    # `generate`, and `get_image_features`, read an image without the whole model.
    is_of_image = layer.reads == "media" or (layer.reads == "either" and x.ndim == 3)
    if router.granularity == "sequence" and is_of_image:
        return over_tokens(router.coefficients(_means_of_whole(router, x)), x)
    if router.granularity == "sequence":
        raise RuntimeError(
            "routing per sequence needs the whole model to be called, not a part of it",
        )
    return router(x)


def reads_of(model: nn.Module, module: str) -> Reads:
    """What a module reads, where a model reads images or sound beside text: `media` in a part that
    reads nothing else, as a vision tower; `either` beside such a part and the language model, as a
    projector. All else reads `text`.
    """
    part = model
    innermost = model
    for name in module.split("."):
        part = getattr(part, name)
        if isinstance(part, PreTrainedModel):
            innermost = part
    if "text" not in _modalities(model):
        return "text"
    if "text" not in _modalities(innermost):
        return "media"
    if _modalities(innermost) == ("text",) or part is _head_of(model):
        return "text"
    for inner in innermost.modules():
        if isinstance(inner, PreTrainedModel) and _modalities(inner) == ("text",):
            return "either"
    return "text"  # the language model's layers lie in it directly


def _head_of(model: nn.Module) -> Any:
    get = getattr(model, "get_output_embeddings", None)
    return None if get is None else get()


def _modalities(model: nn.Module) -> tuple[str, ...]:
    stated = getattr(model, "input_modalities", ())
    return (stated,) if isinstance(stated, str) else tuple(stated)


def _text_shape(model: nn.Module, arguments: dict[str, Any]) -> torch.Size | None:
    """The shape (batch, length) of the text that a model reads beside images or sound; None for one
    that reads text alone, or has the text in another stack.
    """
    modalities = _modalities(model)
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if "text" not in modalities or len(modalities) == 1 or is_encoder_decoder:
        return None
    for name in ("input_ids", "inputs_embeds"):
        if arguments.get(name) is not None:
            return arguments[name].shape[:2]
    return None


def input_in(arguments: dict[str, Any]) -> Any:
    """One of the inputs (batch, …) of a forward pass; None if there is none."""
    return next((arguments[name] for name in _INPUTS if arguments.get(name) is not None), None)


def _knows_no_length(cache: Any) -> bool:
    """Whether none of a cache's layers counts tokens, as in a state-space model."""
    is_linear = getattr(cache, "is_linear", [])
    return bool(is_linear) and all(is_linear)
