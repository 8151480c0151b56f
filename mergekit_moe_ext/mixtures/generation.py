"""Task scores by generation: what a model answers to the prompts of a task, on all processes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm import tqdm

from _mergekit_moe_ext_common.errors import UserError
from mergekit_moe_ext.mixtures.metrics import metric_of, overall_performance
from mergekit_moe_ext.mixtures.tasks import Task


@dataclass(frozen=True)
class TaskScorer:
    """Measures a model on tasks, as often as it is called.

    pairs: the rows of each task, with the columns `input` and `target`.
    max_source_length, max_target_length: the numbers of tokens to which prompts are cut, and of
        answers of tasks that do not state their own.
    """

    tasks: Mapping[str, Task]
    pairs: Mapping[str, Dataset]
    tokenizer: Any
    pad_token_id: int
    batch_size: int
    max_source_length: int
    max_target_length: int
    quiet: bool

    def __call__(self, model: Any) -> dict[str, float]:
        """The score of each task, as `<task>_score`, and, where tasks state those of single-task
        models, `overall_performance`. All processes get the same.
        """
        scores = {}
        for name, task in self.tasks.items():
            answers = self._answers(model, name, task)
            references = list(self.pairs[name]["target"])
            score = metric_of(task.metric)(answers, references)
            if not isinstance(score, int | float):
                raise UserError(f"the metric {task.metric} returns no number, but {score!r}")
            scores[name] = float(score)
        results = {f"{name}_score": score for name, score in scores.items()}
        single_task_scores = {}
        for name, task in self.tasks.items():
            if task.single_task_score is not None:
                single_task_scores[name] = task.single_task_score
        if single_task_scores:
            results["overall_performance"] = overall_performance(scores, single_task_scores)
        return results

    def _answers(self, model: Any, name: str, task: Task) -> list[str]:
        """The answers to all rows of a task, in their order; each process makes a part of them."""
        state = PartialState()
        prompts = []
        for text in self.pairs[name]["input"]:
            encoded = self.tokenizer(text, truncation=True, max_length=self.max_source_length)
            prompts.append(encoded["input_ids"])
        # Prompts of about one length are in a batch together. The longest come first, so that what
        # does not fit into memory shows at once.
        by_length = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
        own = by_length[state.process_index :: state.num_processes]
        answers = []
        bar = tqdm(
            range(0, len(own), self.batch_size),
            desc=f"generating {name}",
            disable=self.quiet or not state.is_main_process,
            leave=False,
        )
        for start in bar:
            rows = own[start : start + self.batch_size]
            number = task.max_new_tokens or self.max_target_length
            texts = generated(
                model,
                self.tokenizer,
                [prompts[row] for row in rows],
                pad_token_id=self.pad_token_id,
                max_new_tokens=number,
            )
            answers += list(zip(rows, texts, strict=True))
        by_row = dict(gather_object(answers))
        return [by_row[row] for row in range(len(prompts))]


def check_prompts(pairs: Mapping[str, Dataset], tokenizer: Any) -> None:
    """`UserError` for a prompt of no tokens: a decoder has nothing to go on from."""
    for name, rows in pairs.items():
        for number, text in enumerate(rows["input"]):
            if not tokenizer(text)["input_ids"]:
                raise UserError(
                    f"the task {name!r} has a prompt without any token, in row {number} of those "
                    "that are measured: put words around the columns, or take the row out"
                )


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
