"""Models that look positions up in a table, and rows that are too long for it."""

from collections.abc import Mapping
from typing import Any

from datasets import Dataset
from torch import nn

from _mergekit_moe_ext_common.errors import UserError


def check_positions(model: Any, rows: Mapping[Any, Dataset], max_length: int) -> None:
    """`UserError` where a row has more tokens than the model has positions; torch would say no more
    than that an index is out of range.

    rows: by source, with `input_ids`, and with `labels` where these are decoded apart.
    max_length: the `--max-length` that cut them.
    """
    limit = positions_in_table(model)
    if limit is None:
        return
    for source, of_source in rows.items():
        longest = 0
        for column in {"input_ids", "labels"} & set(of_source.column_names):
            longest = max([longest, *map(len, of_source[column])])
        if longest > limit:
            raise UserError(
                f"--max-length {max_length}: a row of {source} has {longest} tokens, and the model "
                f"has {limit} positions; give --max-length {limit} or less"
            )


def positions_in_table(model: nn.Module) -> int | None:
    """How many positions a model has that looks them up in a table; None for any other."""
    config: Any = model.config
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int):
        return None
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        is_of_positions = "position" in last or last == "wpe"
        if not is_of_positions or not isinstance(module, nn.Embedding):
            continue
        if hasattr(module, "make_weight"):  # of FSMT, which makes a longer one where it has to
            return None
        # OPT and BART have two rows more than positions. RoBERTa and its like count from the row
        # after that of padding, and their configuration counts these rows.
        if type(module) is nn.Embedding and module.padding_idx is not None:
            return min(limit, module.num_embeddings - module.padding_idx - 1)
        if limit <= module.num_embeddings:
            return limit
    return None
