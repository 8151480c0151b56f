"""The seam to transformers' key-value caches: what a cache is called, and that it comes back.

A choice that holds for a whole sequence is kept with the key-value cache that the sequence fills.
transformers has moved that cache once: up to 5.23 `forward` takes and returns it as
`past_key_values` (`cache_params` in state-space models), from 5.24 as `cache`, and the old names
are taken until 5.40 with a warning. So a cache is found by what it is, and named as the host at
hand names it. Once no transformers below 5.24 has to be served, `OLD_NAMES` can go.

Because a host may move again, nothing here trusts that a cache comes back: within one `generate` a
sequence is begun once. A second beginning means that the cache of the first one was lost on the
way, and is an error.

This file stands in two places, `_mergekit_moe_ext_common/` and `mergekit_moe_ext/modeling/`, the
same to the letter (a test compares them): what is copied beside a model's weights can import
nothing from outside its own folder.
"""

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import transformers
from torch import Tensor
from transformers import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

NEW_NAME = "cache"  # from transformers 5.24
OLD_NAMES = ("past_key_values", "cache_params")
NAMES = (NEW_NAME, *OLD_NAMES)
TRIED = "5.21.0 to 5.24.0"  # the versions of transformers that generation was tested with

# What transformers' own outputs call the cache here.
_OUTPUT_NAMES = [name for name in NAMES if name in CausalLMOutputWithPast.__dataclass_fields__]
if not _OUTPUT_NAMES:
    raise ImportError(
        f"transformers {transformers.__version__} calls its key-value cache none of "
        f"{', '.join(NAMES)}; tried were {TRIED}: install one of these"
    )
OUTPUT_NAME = _OUTPUT_NAMES[0]


def cache_in(values: Any) -> Cache | None:
    """The cache among a forward pass's arguments or in its output, a mapping or a tuple.

    None if there is none.
    """
    candidates = values.values() if isinstance(values, Mapping) else values
    return next((value for value in candidates if isinstance(value, Cache)), None)


def name_of_cache(parameters: Mapping[str, Any]) -> str | None:
    """The name that a `forward` with these parameters has for its cache; None if it takes none."""
    return next((name for name in NAMES if name in parameters), None)


def with_cache_renamed(
    arguments: Mapping[str, Any],
    parameters: Mapping[str, Any],
) -> dict[str, Any]:
    """The arguments of a `forward` with these parameters, their cache under its name there.

    A `forward` of transformers ignores a name that it does not know, and would go on without the
    cache: `ValueError` where one is given by such a name, or by several names.
    """
    name = name_of_cache(parameters)
    for key, value in arguments.items():
        if isinstance(value, Cache) and key not in NAMES and key not in parameters:
            raise ValueError(
                f"{key}= is a key-value cache, which this model takes as {name}= "
                f"(transformers {transformers.__version__}; tried were {TRIED})"
            )
    present = [key for key in NAMES if arguments.get(key) is not None]
    if len(present) > 1:
        first, second = present[:2]
        raise ValueError(f"{first}= and {second}= are two names of one cache: give {first}= alone")
    if not present or name is None or present[0] == name:
        return dict(arguments)
    renamed = {key: value for key, value in arguments.items() if key not in NAMES}
    renamed[name] = arguments[present[0]]
    return renamed


def refuse_other_caches(arguments: Mapping[str, Any]) -> None:
    """`ValueError` where a forward pass is handed a cache that is not a `Cache`.

    Continuous batching has one of its own kind, with which no choice for a sequence can be kept.
    """
    for name in NAMES:
        value = arguments.get(name)
        if value is not None and not isinstance(value, Cache):
            raise ValueError(
                f"{name}= is a {type(value).__name__}, which keeps no choice for a sequence: "
                "generate without continuous batching (generate_batch, "
                "cache_implementation='paged')"
            )


class FollowingCache:
    """A cache that does to what is kept with it what is done to its own rows, as in beam search.

    It is put before the class of a cache by `following`, and says what is kept in `change_rows`.
    """

    def change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a function to every tensor (rows, …) that is kept with the cache."""
        raise NotImplementedError

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self.change_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self.change_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self.change_rows(lambda rows: rows[indices.to(rows.device)])

    # Its class has no name that could be imported, so that copies and files name the two that it
    # was made of.
    def __reduce_ex__(self, protocol: Any) -> Any:
        follower, kind = type(self).__bases__
        reduced: Any = super().__reduce_ex__(protocol)
        return _new, (kind, follower), *reduced[2:]


@functools.cache
def following(kind: type[Cache], follower: type[FollowingCache]) -> Any:
    """The class of a cache of this kind whose rows are followed by what `follower` keeps."""
    return type(f"{follower.__name__}{kind.__name__}", (follower, kind), {})


def _new(kind: Any, follower: Any) -> Any:
    """A cache of a class that `following` makes, before it has what is in it."""
    made = following(kind, follower)
    return made.__new__(made)


class _Running(threading.local):
    """The innermost `generate` of this thread."""

    generation: "_Generation | None" = None


class _Generation:
    """One call of a model's `generate`."""

    def __init__(self, model: Any, beginnings: int) -> None:
        self.model = model
        self.beginnings = beginnings  # how many are left


_RUNNING = _Running()


@contextmanager
def generating(model: Any, guidance_scale: float | None = None) -> Iterator[None]:
    """A context, of one call of `generate`, in which the model may begin its sequences once.

    With a `guidance_scale` transformers runs the model beside it on a prompt of its own, with a
    cache of its own, which is a second beginning.
    """
    outer = _RUNNING.generation
    _RUNNING.generation = _Generation(model, 1 if guidance_scale in (None, 1) else 2)
    try:
        yield
    finally:
        _RUNNING.generation = outer


def is_generating(model: Any) -> bool:
    """Whether the innermost `generate` of this thread is of this model."""
    generation = _RUNNING.generation
    return generation is not None and generation.model is model


def begin_sequences(model: Any) -> None:
    """Note that a forward pass of the model begins its sequences anew, and chooses for them.

    `RuntimeError` where the same `generate` began them before: then the cache that carried the
    choice was lost.
    """
    generation = _RUNNING.generation
    if generation is None or not is_generating(model):
        return
    if generation.beginnings == 0:
        raise RuntimeError(
            f"{type(model).__name__}: what is chosen for a sequence is kept with the key-value "
            "cache, and the cache that was filled did not come back in the next step of "
            f"`generate`. This is transformers {transformers.__version__}; tried were {TRIED}. "
            "Install one of these, or give coefficients="
        )
    generation.beginnings -= 1
