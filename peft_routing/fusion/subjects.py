"""What is put on the base model to be measured: nothing, one adapter, or many fused."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from peft import PeftModel, PromptLearningConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.loading import explained
from peft_routing.adapter_files import fingerprint, read_config
from peft_routing.config import RoutedLoraConfig
from peft_routing.fusion.cache import Subject
from peft_routing.fusion.generation import Of, ensemble


def base_alone() -> Subject:
    """The base model as it is."""
    return Subject("base model", "", lambda base: base)


def one_expert(name: str, path: str) -> Subject:
    """One adapter, as an expert that has the coefficient 1 everywhere.

    `UserError` and `FileNotFoundError` where its files cannot be read.
    """
    own = fingerprint(path, f"expert {name!r} ({path})")
    return Subject(
        f"expert {name!r}",
        _digest("expert", own),
        lambda base: get_peft_model(base, composed({name: path}, router="uniform", mixing="full")),
    )


def fused(name: str, experts: Mapping[str, str], options: Mapping[str, Any]) -> Subject:
    """All experts as one routed adapter with these options of `RoutedLoraConfig`."""
    own = [fingerprint(path, f"expert {each!r} ({path})") for each, path in experts.items()]
    return Subject(
        name,
        _digest("fused", own, dict(options)),
        lambda base: get_peft_model(base, composed(experts, **options)),
    )


def mixture_of(
    name: str,
    experts: Mapping[str, str],
    coefficients: Mapping[str, float],
    *,
    of: Of = "probabilities",
    beta: float = 0.0,
) -> Subject:
    """The ensemble of the experts that have a coefficient above 0, as `ensemble` runs it."""
    used = {each: experts[each] for each, value in coefficients.items() if value > 0}
    own = []
    for each, path in used.items():
        own.append([fingerprint(path, f"expert {each!r} ({path})"), coefficients[each]])
    return Subject(
        name,
        _digest("mixture", own, of, beta),
        lambda base: get_peft_model(base, composed(used, router="uniform", mixing="full")),
        running=lambda model: ensemble(
            model, {each: coefficients[each] for each in used}, of=of, beta=beta
        ),
    )


def any_adapter(name: str, path: str, where: str) -> Subject:
    """An adapter of any type, a routed one among them, as PEFT loads it from a directory.

    `where` is what messages call it.
    `UserError` for one that chooses per sequence: in a text that is scored it would choose by the
    tokens that it is to predict. And for one that is a prompt: a text's tokens would not be where
    they are looked for.
    """
    try:
        config = read_config(path, where)
    except FileNotFoundError as error:
        raise UserError(str(error)) from error
    if config.get("granularity") == "sequence":
        raise UserError(
            f"{where}: it chooses per sequence, by tokens that are scored here, so that its "
            "figures would be too good"
        )

    peft_type = config.get("peft_type")
    if issubclass(PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type, object), PromptLearningConfig):
        raise UserError(f"{where}: it is a prompt ({peft_type}), and only adapters are compared")

    def put_on(base: Any) -> Any:
        with explained(f"{where} does not fit a {type(base).__name__}", path):
            return PeftModel.from_pretrained(base, path)

    # PEFT's `unload` leaves the adapter's own copies of modules (modules_to_save) and its biases.
    own = fingerprint(path, where)
    return Subject(f"fusion {name!r}", _digest("adapter", own), put_on, stays_on=True)


def with_top_k(subject: Subject, k: int) -> Subject:
    """A routed adapter whose router keeps the k largest coefficients, scaled to their sum (B.4)."""

    def put_on(base: Any) -> Any:
        model = subject.put_on(base)
        model.base_model.set_routing(top_k=k)
        return model

    own = _digest("top_k", subject.fingerprint, k)
    return Subject(f"{subject.name}, top {k}", own, put_on, stays_on=subject.stays_on)


def composed(experts: Mapping[str, str], **options: Any) -> RoutedLoraConfig:
    """The configuration of a routed adapter that is to be composed of these experts."""
    return RoutedLoraConfig(experts=dict(experts), **options)


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
