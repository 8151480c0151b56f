"""Task scores by generation: what a model answers to the prompts of a task, on all processes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from tqdm import tqdm

from _mergekit_moe_ext_common.errors import UserError
from _mergekit_moe_ext_common.generation import answers_to
from _mergekit_moe_ext_common.metrics import score_of
from mergekit_moe_ext.mixtures.metrics import overall_performance
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
            scores[name] = score_of(task.metric, answers, references)
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
        texts = list(self.pairs[name]["input"])
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_source_length)
        prompts = encoded["input_ids"]
        # Each process has as many long ones as the others.
        by_length = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
        own = by_length[state.process_index :: state.num_processes]
        is_silent = self.quiet or not state.is_main_process
        with tqdm(total=len(own), desc=f"generating {name}", disable=is_silent, leave=False) as bar:
            answers = answers_to(
                model,
                self.tokenizer,
                prompts,
                own,
                pad_token_id=self.pad_token_id,
                max_new_tokens=task.max_new_tokens or self.max_target_length,
                batch_size=self.batch_size,
                bar=bar,
            )
        by_row = dict(gather_object(list(answers.items())))
        return [by_row[row] for row in range(len(prompts))]


def check_prompts(pairs: Mapping[str, Dataset], tokenizer: Any) -> None:
    """`UserError` for a prompt of no tokens: a decoder has nothing to go on from."""
    for name, rows in pairs.items():
        for number, prompt in enumerate(tokenizer(list(rows["input"]))["input_ids"]):
            if not prompt:
                raise UserError(
                    f"the task {name!r} has a prompt without any token, in row {number} of those "
                    "that are measured: put words around the columns, or take the row out"
                )
