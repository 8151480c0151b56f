"""What a model answers to prompts."""

from collections.abc import Sequence
from typing import Any

import torch


def answers_to(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    numbers: Sequence[int],
    *,
    pad_token_id: int,
    max_new_tokens: int,
    batch_size: int,
    bar: Any = None,
) -> dict[int, str]:
    """What a model answers to the prompts of these numbers, by number; `bar` counts them.

    Prompts of about one length share a batch, so that little of it is padding. The longest come
    first, so that what does not fit into memory shows at once.
    """
    by_length = sorted(numbers, key=lambda number: -len(prompts[number]))
    answers: dict[int, str] = {}
    for start in range(0, len(by_length), batch_size):
        own = by_length[start : start + batch_size]
        texts = generated(
            model,
            tokenizer,
            [prompts[number] for number in own],
            pad_token_id=pad_token_id,
            max_new_tokens=max_new_tokens,
        )
        answers.update(zip(own, texts, strict=True))
        if bar is not None:
            bar.update(len(own))
    return answers


@torch.no_grad()
def generated(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    max_new_tokens: int,
) -> list[str]:
    """What a model answers to a batch of prompts, the likeliest token at each step.

    A decoder's prompts are padded on the left, an encoder-decoder's on the right.
    """
    is_pair = model.config.is_encoder_decoder
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if is_pair else slice(longest - len(prompt), longest)
        ids[row, place] = torch.tensor(prompt)
        mask[row, place] = 1
    tokens = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_token_id,
    )
    answers = tokens if is_pair else tokens[:, longest:]
    return tokenizer.batch_decode(answers, skip_special_tokens=True)
