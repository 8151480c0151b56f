"""The one door through which every command opens a model, its configuration and its tokenizer.

transformers gives random values to what a checkpoint lacks, and goes on. Here a model is whole or
it is an error, a sentence that says what is wrong, where, and what would be right:

1. `load_config`: the configuration can be read, and its values have the right types and sizes.
2. `check_model`, before anything is loaded: the files are safetensors, and by their headers every
   tensor that the architecture has is there, in its shape, and no tensor has no place.
3. `load_model`, once it is: no value is NaN or infinity.

(A merge has checks of its own, since it reads no model as a whole.)
"""

import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.utils import HFValidationError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedConfig,
)
from transformers.core_model_loading import revert_weight_conversion

from _mergekit_moe_ext_common.cards import is_on_hub
from _mergekit_moe_ext_common.checkpoints import (
    Stored,
    check_regular,
    damaged_file,
    first_line,
    is_finite,
    no_weights,
    non_finite_in,
    read_headers,
    weight_files,
    wrapper_of,
)
from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.options import Reading

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# These and others: T5's spiece.model, XLM-R's sentencepiece.bpe.model, Marian's source.spm.
_VOCABULARY = re.compile(r"tokenizer\.json|vocab.*|.*\.(model|spm|tiktoken|bpe)|tekken\.json")
# Modules are made one by one, so that a number of them that is out of all proportion is not an
# error of its own but a wait without end. By how keys end: the most that are taken.
_MOST_MODULES = {"layer": 1_000, "layers": 1_000, "experts": 10_000}
_DROPOUT = re.compile(r"(dropout|pdrop)(_(prob|rate|p))?$")
_EPSILON = re.compile(r"(^|_)(eps|epsilon)$")
# Rotary embeddings divide by powers of these.
_ROTARY = re.compile(r"^(rope_(local_base_freq|theta)|rotary_emb_base|factor)$")
_CHOSEN_EXPERTS = ("num_experts_per_tok", "moe_topk", "moe_k")
_ALL_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# What transformers says of a name that is neither a directory nor found on the Hub. A model
# that may not be read, or a full disk, is something else.
_ABSENT = re.compile(
    "couldn't connect|cannot find the requested files|is not a valid model identifier|"
    "Repo id must|Incorrect path_or_model_id"
)
_EITHER_IS_WRONG = "fetch the checkpoint again, or mend the config, whichever is wrong"


def load_config(model: str, reading: Reading) -> Any:
    """The configuration of a model, a directory or a name on the Hub."""
    check_directory(model)
    with explained(f"cannot read the config of {model}", model), existing(model):
        read_values(_expanded(model))
        return AutoConfig.from_pretrained(
            _expanded(model), trust_remote_code=reading.trust_remote_code
        )


def check_directory(model: str) -> None:
    """`UserError` where a path leads to no directory, or to one that holds no model."""
    directory = _existing(model)
    if directory is None:
        return
    if not (directory / "config.json").exists():
        if (directory / "adapter_config.json").exists():
            raise UserError(no_weights(model))
        raise UserError(f"{model} has no config.json: it is not a model")
    # transformers takes its own defaults in place of one that it cannot read.
    generation = damaged_file(directory, "generation_config.json")
    if generation is not None:
        raise UserError(generation)


def _existing(model: str) -> Path | None:
    """The directory of a model, whose files are files; None where it is on the Hub."""
    directory = Path(model).expanduser()
    if directory.is_dir():
        check_regular(directory)
        return directory
    if model.startswith((".", "/", "~")):
        raise UserError(f"{model} does not exist")
    return None


def read_values(model: str, revision: str | None = None) -> dict[str, Any]:
    """The values in a model's config.json.

    `UserError` for those that transformers takes, and with which nobody could build, run or save a
    model.
    """
    values, _ = PreTrainedConfig.get_config_dict(model, revision=revision)
    if not isinstance(values.get("auto_map", {}), Mapping | None):
        raise UserError(
            f"the config of {model} says auto_map: {values['auto_map']!r}, which is no mapping of "
            "classes: take that key out"
        )
    architectures = values.get("architectures") or []
    names = architectures if isinstance(architectures, list) else [None]
    if not all(isinstance(name, str) for name in names):
        raise UserError(
            f"the config of {model} says architectures: {architectures!r}, which is no list of "
            "the names of classes"
        )
    _check_numbers_of_modules(values, model)
    _check_fractions(values, model)
    return values


def _check_fractions(values: Mapping[str, Any], model: str) -> None:
    """`UserError` for NaN, a probability of dropout that is none, an epsilon below 0, and a rotary
    base or factor that is not above 0.
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            _check_fractions(value, model)
        numbers = value if isinstance(value, list) else [value]
        for number in numbers:
            if not isinstance(number, int | float):
                continue
            complaint = ""
            if math.isnan(number):
                complaint = "which is no number"
            elif _DROPOUT.search(key) and not 0 <= number <= 1:
                complaint = "which is no probability"
            elif _EPSILON.search(key) and number < 0:
                complaint = "which must not be negative"
            elif _ROTARY.search(key) and number <= 0:
                complaint = "which must be above 0"
            if complaint:
                raise UserError(f"the config of {model} says {key}: {value}, {complaint}")


def _check_numbers_of_modules(values: Mapping[str, Any], model: str) -> None:
    """`UserError` for a configuration of so many layers or experts that nobody could build them, or
    of more experts per token than there are.
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            _check_numbers_of_modules(value, model)
        most = _MOST_MODULES.get(key.rpartition("_")[2])
        if key.endswith("feature_layer"):  # the place of one, counted from either end
            continue
        if most and isinstance(value, int) and not -1 <= value <= most:
            raise UserError(
                f"the config of {model} says {key}: {value}; no model has so many (-1 to {most} "
                "are taken)"
            )
    for chosen in _numbers(values, _CHOSEN_EXPERTS):
        for number in _numbers(values, _ALL_EXPERTS):
            if number > 0 and not 1 <= chosen <= number:
                raise UserError(
                    f"the config of {model} has a token choose {chosen} of {number} experts: mend "
                    "the number per token"
                )


def _numbers(values: Mapping[str, Any], keys: Sequence[str]) -> list[int]:
    return [values[key] for key in keys if isinstance(values.get(key), int)]


def load_tokenizer(model: str, reading: Reading) -> Any:
    """The tokenizer of a model, a directory or a name on the Hub."""
    _existing(model)  # refuses a path that leads nowhere
    path = _expanded(model)
    try:
        tokenizer = read_tokenizer(path, model, trust_remote_code=reading.trust_remote_code)
    except NoTokenizerError as error:
        names = ", ".join(TOKENIZER_FILES)
        raise UserError(f"{error.message}, which is one of {names}: copy it there") from error
    with explained(f"cannot read the tokenizer of {model}", model):
        tokenizer("a")  # some are found to be damaged only when they are used
    return tokenizer


class NoTokenizerError(UserError):
    """A directory has no tokenizer."""


def read_tokenizer(place: str, name: str, **options: Any) -> Any:
    """The tokenizer in a directory or on the Hub, which transformers reads with these options.

    name: what the messages call it.

    `NoTokenizerError` where a directory has none. Another `UserError` where it cannot be read: for
    want of a library that it needs, say.
    """
    has_none = _has_no_vocabulary(Path(place).expanduser())
    words: set[str] = set()
    try:
        with explained(f"cannot read the tokenizer of {name}", place):
            tokenizer = AutoTokenizer.from_pretrained(place, **options)
            if has_none:
                words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    except UserError as error:
        if has_none:
            raise NoTokenizerError(f"{name} has no tokenizer") from error
        raise
    # Some need no file with words (ByT5). For many other models transformers makes up a tokenizer
    # that knows none.
    if has_none and not words:
        raise NoTokenizerError(f"{name} has no tokenizer")
    return tokenizer


def _has_no_vocabulary(directory: Path) -> bool:
    """Whether nothing in a directory is the vocabulary of a tokenizer, whole or damaged, nor names
    code that might have one.
    """
    if not directory.is_dir():
        return False
    if any(_VOCABULARY.fullmatch(path.name) for path in directory.iterdir()):
        return False
    settings = directory / "tokenizer_config.json"
    if not settings.exists():
        return True
    if damaged_file(directory, settings.name) is not None:
        return False
    return "auto_map" not in settings.read_text(encoding="utf-8")


def vocabulary_of(config: Any) -> int | None:
    """The number of tokens that a model knows; None where its configuration does not say."""
    size = getattr(config, "vocab_size", None)
    if size is None and hasattr(config, "get_text_config"):
        size = getattr(config.get_text_config(), "vocab_size", None)
    return size if isinstance(size, int) else None


def padding_token(tokenizer: Any, vocabulary: int | None) -> int:
    """Any that the model knows, where the tokenizer has none such: padding is masked."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None and (vocabulary is None or token < vocabulary):
            return token
    return 0


def check_model(
    model: str,
    config: Any,
    reading: Reading,
    *,
    architecture: Any = None,
    not_stored: Collection[str] = (),
) -> Mapping[str, Stored]:
    """The tensors in the files of a model, if they are what its configuration says.

    Only headers are read, so that a command can call this before it does anything else.
    `architecture` is a class of transformers or one of its Auto classes; by default the Auto class
    of decoders or of encoder-decoders. `not_stored` are modules beside the trunk that come from
    elsewhere, so that the files may be of a model with another head. `UserError` where a tensor is
    missing, has another shape or has no place.
    """
    if getattr(config, "transformers_weights", None):
        raise UserError(
            f"the config of {model} names its file of weights itself (transformers_weights: "
            f"{config.transformers_weights!r}): take that key out, and call the file "
            "model.safetensors"
        )
    headers = read_headers(weight_files(model))
    # What a quantised model stores has names and shapes of its own.
    if getattr(config, "quantization_config", None) is not None:
        return headers
    # Has transformers load tensors without memory, as the files describe theirs: so names are
    # renamed, experts are stacked and weights are tied as they will be.
    tensors = {
        name: torch.empty(each.shape, dtype=each.dtype, device="meta")
        for name, each in headers.items()
    }
    with explained(f"cannot build a model by the config of {model}", model), _silence():
        empty = _empty(architecture or _auto_class(config), config, reading)
        try:
            with torch.device("meta"):  # what is computed from the configuration, too
                loaded, report = type(empty).from_pretrained(
                    None,
                    config=empty.config,
                    state_dict=tensors,
                    device_map="meta",
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
        except RuntimeError:  # single experts that cannot be stacked, and no report
            doubtful = [name for name, _ in empty.named_parameters()]
            _check_doubtful(model, empty, headers, doubtful)
            raise
    _check_report(model, loaded, headers, _of_trunk(loaded, report, not_stored))
    _check_types(loaded, headers)
    return headers


def load_model(
    model: str,
    config: Any,
    reading: Reading,
    *,
    architecture: Any = None,
    headers: Mapping[str, Stored] | None = None,
    not_stored: Collection[str] = (),
    **keywords: Any,
) -> Any:
    """The model, whole and finite; `keywords` are those of `from_pretrained`.

    `headers` are what `check_model` has found, where it was called before; else it is called here.
    What is not stored has the values that transformers begins with.
    `UserError` as the top of this file describes it.
    """
    if headers is None:
        headers = check_model(
            model, config, reading, architecture=architecture, not_stored=not_stored
        )
    with explained(f"cannot load {model}", model):
        loaded, report = (architecture or _auto_class(config)).from_pretrained(
            _expanded(model),
            config=config,
            trust_remote_code=reading.trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **keywords,
        )
    _check_report(model, loaded, headers, _of_trunk(loaded, report, not_stored))
    _check_values(model, loaded, headers)
    return loaded


def _auto_class(config: Any) -> Any:
    """The Auto class of encoder-decoders, of decoders, or of decoders that also see."""
    if getattr(config, "is_encoder_decoder", False):
        return AutoModelForSeq2SeqLM
    # An architecture of ours names its Auto class; every mapping has a place for ours.
    stated = getattr(config, "auto_map", None) or {}
    sees = type(config) in AutoModelForImageTextToText._model_mapping
    is_decoder = type(config) in AutoModelForCausalLM._model_mapping
    if "AutoModelForImageTextToText" in stated or (sees and not is_decoder):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def check_device(device: str, remedy: str = "auto and cpu are always there") -> None:
    """`UserError` where this machine has no device of that name, which ends in the remedy; `auto`
    is none.
    """
    if device == "auto":
        return
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = first_line(error).partition(". ")[0]  # of mps many sentences follow
        raise UserError(f"torch finds no device {device!r} here ({reason}); {remedy}") from error
    if place.type == "meta":
        raise UserError(f"nothing is computed on the device {device!r}; {remedy}")


def _empty(architecture: Any, config: Any, reading: Reading) -> Any:
    """The architecture without memory."""
    with torch.device("meta"):
        if hasattr(architecture, "from_config"):  # an Auto class
            return architecture.from_config(config, trust_remote_code=reading.trust_remote_code)
        return architecture(config)


def _of_trunk(
    loaded: Any, report: Mapping[str, Any], not_stored: Collection[str]
) -> Mapping[str, Any]:
    """The report of a loading without modules that are not stored and, where there are such,
    without the head of the files.
    """
    if not not_stored:
        return report
    missing = []
    for name in report["missing_keys"]:
        if not set(not_stored) & set(name.split(".")):
            missing.append(name)
    trunk = getattr(loaded, loaded.base_model_prefix, loaded)
    parts_of_trunk = {loaded.base_model_prefix, *dict(trunk.named_children())}
    surplus = []
    for name in report["unexpected_keys"]:
        if name.partition(".")[0] in parts_of_trunk:
            surplus.append(name)
    return {**report, "missing_keys": missing, "unexpected_keys": surplus}


def _check_report(
    model: str, loaded: Any, headers: Mapping[str, Stored], report: Mapping[str, Any]
) -> None:
    """`UserError` where transformers' report of a loading says that not everything fits."""
    missing = sorted(report["missing_keys"])
    shapes = {name: tuple(there) for name, there, _ in sorted(report["mismatched_keys"])}
    _check_doubtful(model, loaded, headers, {**dict.fromkeys(missing), **shapes})
    kind = type(loaded).__name__
    if missing:  # under other names than `_check_doubtful` expects
        raise UserError(f"{_where(model, headers)} lacks {_counted(missing)}, which {kind} has")
    for name, there in shapes.items():
        here = tuple(loaded.state_dict()[name].shape)
        raise UserError(
            f"{name} of {_where(model, headers)} has the shape {there}, and {kind} by its "
            f"config.json has {here}: {_EITHER_IS_WRONG}"
        )
    surplus = sorted(report["unexpected_keys"])
    if surplus:
        raise UserError(
            f"{_where(model, headers)} holds {_counted(surplus)}, for which {kind} has no place by "
            f"its config.json: {_EITHER_IS_WRONG}"
        )


def _check_doubtful(
    model: str, loaded: Any, headers: Mapping[str, Stored], names: Collection[str]
) -> None:
    """`UserError` where the files lack what these tensors of a model are made of, or have it in
    another shape.
    """
    state = loaded.state_dict()
    chosen = {name: state[name] for name in names if name in state}
    # Their names and shapes in the files: of stacked experts, say, those of each. A config of no
    # experts at all makes transformers divide nothing by nothing.
    with explained(f"cannot tell by its config what the files of {model} must hold", model):
        expected = revert_weight_conversion(loaded, chosen)
    kind = type(loaded).__name__
    lacking = sorted(name for name in expected if name not in headers)
    if lacking:
        wrapper = wrapper_of(headers, lacking)
        if wrapper:
            raise UserError(f"{_where(model, headers)}: {wrapper}")
        raise UserError(
            f"{_where(model, headers)} lacks {_counted(lacking)}, which {kind} has by its "
            f"config.json: {_EITHER_IS_WRONG}"
        )
    for name, tensor in expected.items():
        there = headers[name].shape
        here = tuple(tensor.shape)
        if there != here:
            raise UserError(
                f"{name} of {headers[name].file} has the shape {there}, and {kind} by its "
                f"config.json has {here}: {_EITHER_IS_WRONG}"
            )


def _where(model: str, headers: Mapping[str, Stored]) -> Path:
    """The one file of weights, or the directory of several."""
    files = sorted({each.file for each in headers.values()})
    return files[0] if len(files) == 1 else Path(model).expanduser()


def _counted(names: Sequence[str]) -> str:
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{others}"


def _check_types(loaded: Any, headers: Mapping[str, Stored]) -> None:
    """`UserError` where whole numbers are stored for what has fractions: they would be converted
    in silence.
    """
    state = loaded.state_dict()
    for name, each in headers.items():
        if name in state and state[name].is_floating_point() and not each.dtype.is_floating_point:
            raise UserError(
                f"{name} of {each.file} is stored as {each.dtype}, and {type(loaded).__name__} "
                "has fractions there: fetch the file again"
            )


def _check_values(model: str, loaded: Any, headers: Mapping[str, Stored]) -> None:
    """`UserError` where a parameter or buffer of the model holds NaN or infinity."""
    state = loaded.state_dict()
    damaged = next((name for name, tensor in state.items() if not is_finite(tensor)), None)
    if damaged is not None:
        in_file = non_finite_in(headers)
        if in_file is None:
            raise UserError(
                f"{damaged} of {model} does not fit into {state[damaged].dtype}, the dtype of its "
                "config: its largest values become infinite; set `dtype` in config.json to "
                "float32 or bfloat16"
            )
        raise UserError(
            f"{in_file} of {headers[in_file].file} holds NaN or infinity: take the checkpoint as "
            "it was before its training diverged or its file was damaged"
        )
    for name, tensor in loaded.named_buffers():
        if name in state or not tensor.is_floating_point():
            continue
        # Masks are made of minus infinity.
        unmasked = tensor.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=0.0)
        if not is_finite(unmasked):
            raise UserError(
                f"{name}, which {type(loaded).__name__} computes from the config of {model}, holds "
                "NaN or infinity: mend the config (of a rotary embedding, its rope_parameters)"
            )


@contextmanager
def explained(what: str, model: str) -> Iterator[None]:
    """Whatever a damaged file makes transformers raise, as a `UserError`.

    There is no list of what that may be: wrong types in a configuration alone raise a dozen kinds.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        directory = Path(model).expanduser()
        reason = damaged_file(directory) or first_line(error)
        raise UserError(f"{what}: {reason}") from error


@contextmanager
def existing(model: str) -> Iterator[None]:
    """A `UserError` where transformers, asked for a configuration, finds neither a directory nor a
    model on the Hub.
    """
    try:
        yield
    except (OSError, HFValidationError) as error:
        is_absent = isinstance(error, HFValidationError) or _ABSENT.search(str(error))
        if Path(model).expanduser().exists() or not is_absent:
            raise
        # Most names without an owner are of directories: why the Hub has none says little then.
        reason = f" ({first_line(error)})" if is_on_hub(model) else ""
        raise UserError(
            f"there is no directory {model}, and no model of that name on the Hub that can be "
            f"reached{reason}"
        ) from error


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps transformers' own report of a rehearsal, and its bar, to itself."""
    verbosity = transformers.utils.logging.get_verbosity()
    has_bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
        if has_bars:
            transformers.utils.logging.enable_progress_bar()


def _expanded(model: str) -> str:
    return str(Path(model).expanduser()) if model.startswith("~") else model


def silence(reading: Reading) -> None:
    """No bars of transformers and datasets where the user, or another process's user, sees them."""
    if reading.quiet or int(os.environ.get("LOCAL_RANK", "0")) != 0:
        transformers.utils.logging.disable_progress_bar()
        import datasets  # here, since a routed adapter is loaded without it

        datasets.disable_progress_bars()
