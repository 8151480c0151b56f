"""Loading a mixture of experts and its tokenizer with transformers, with errors for people."""

import os
from pathlib import Path
from typing import Any

import datasets
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.options import Reading


def _expanded(model: str) -> str:
    return str(Path(model).expanduser()) if model.startswith("~") else model


def load_config(model: str, reading: Reading) -> Any:
    if model.startswith((".", "/", "~")) and not Path(model).expanduser().is_dir():
        raise UserError(f"{model} does not exist")
    try:
        return AutoConfig.from_pretrained(
            _expanded(model), trust_remote_code=reading.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot read the config of {model}: {str(error).splitlines()[0]}"
        ) from error


def load_tokenizer(model: str, reading: Reading) -> Any:
    try:
        return AutoTokenizer.from_pretrained(
            _expanded(model), trust_remote_code=reading.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"cannot read the tokenizer of {model}: {str(error).splitlines()[0]}"
        ) from error


def padding_token(tokenizer: Any) -> int:
    """Any that exists, where the tokenizer has none: padding is masked."""
    return (
        tokenizer.pad_token_id
        if tokenizer.pad_token_id is not None
        else tokenizer.eos_token_id or 0
    )


def load_model(model: str, config: Any, reading: Reading, **keywords: Any) -> Any:
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    try:
        return auto.from_pretrained(
            _expanded(model), config=config, trust_remote_code=reading.trust_remote_code, **keywords
        )
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {model}: {str(error).splitlines()[0]}") from error


def silence(reading: Reading) -> None:
    """No bars of transformers and datasets where the user, or another process's user, sees them."""
    if reading.quiet or int(os.environ.get("LOCAL_RANK", "0")) != 0:
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
