"""The page of all claims, from the records alone."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from verdicts import FAILS, HOLDS, UNCLEAR, Verdict, judge

from claims.papers import PAPERS, Claim, Paper, Part
from claims.records import EXPERIMENTS, Experiment, Record

NOT_RUN = "not run"
WORDS = (HOLDS, FAILS, UNCLEAR, NOT_RUN)
HEAD = """\
<!-- Made by `make claims` from the files in claims/. Change those, or examples/claims. -->

# The papers' claims

Five papers say that one thing is better than another. This page has their claims, one by one, with
their numbers, and what came out here. Everything is small: models of one to 135 million parameters,
and minutes or hours of two cores. So it tests the direction of a claim, not its size.

    make claims SCALE=small

runs the experiments, or goes on with them, and writes this page. `SCALE=quick` takes minutes and
shows that everything runs, `SCALE=full` takes a night or more; no full run has been made. What the
page rests on is one file of JSON per experiment, in `docs/claims/`."""
RULE = """\
## The rule

A claim is judged by paired differences: both things are measured with the same seed on the same
test data of the same task.

1. Each seed has a mean over the tasks. The mean of these, over at least three seeds, has to be so
   far from 0 that its interval of 90 percent by Student's t leaves 0 out. With three seeds that is
   2.92 standard errors.
2. More than half of the tasks, each with its mean over seeds, have to point the same way, so that
   no mean is carried by one task against the others.

Then the claim **holds** where the mean is on the paper's side, and **does not hold** where it is on
the other. All else is **unclear**. Where nothing is drawn at random the tasks stand in place of the
seeds, if they are five or more. What is no mean over tasks counts as one task.

If two things were alike, noise would give a false "holds" about once in twenty comparisons, and as
often a false "does not hold". Nothing corrects for how many comparisons there are on this page.
The rule is in `examples/verdicts.py`, and all examples use it.

In the tables *ours* has the mean over seeds and its standard deviation. A row that was measured
once has none. The *difference* is positive where the paper is right. Beside it are its standard
error, and in how many seeds and tasks it is positive."""


def render(records: Mapping[str, Record]) -> str:
    """The page in Markdown."""
    parts = [HEAD, _overview(records), RULE]
    for paper in PAPERS:
        parts.append(f"## {paper.name}")
        parts.append(f"[The paper]({paper.link}). Its numbers: {paper.of_paper}")
        for part in paper.parts:
            parts += _section(paper, part, records.get(part.experiment))
    return "\n\n".join(parts) + "\n"


def verdict_of(claim: Claim, record: Record | None, experiment: Experiment) -> Verdict | None:
    """The verdict on a claim; None where what it needs was not measured."""
    if record is None:
        return None
    if claim.margin:
        margins = record.margins.get(claim.margin)
        return judge(list(margins.values())) if margins else None
    better = record.rows.get(claim.better)
    worse = record.rows.get(claim.worse)
    if not better or not worse:
        return None
    sign = -1 if experiment.lower_is_better else 1
    differences = []
    for seed in paired_seeds(better, worse):
        ours = better.get(seed) or better["0"]
        theirs = worse.get(seed) or worse["0"]
        tasks = claim.tasks or experiment.tasks
        if not all(task in ours and task in theirs for task in tasks):
            return None
        differences.append([sign * (ours[task] - theirs[task]) + claim.slack for task in tasks])
    return judge(differences, claim.is_drawn) if differences else None


def paired_seeds(first: Mapping[str, object], second: Mapping[str, object]) -> list[str]:
    """The seeds that both have. What was measured once is paired with every seed of the other."""
    if list(first) == ["0"]:
        return list(second)
    if list(second) == ["0"]:
        return list(first)
    return [seed for seed in first if seed in second]


def _overview(records: Mapping[str, Record]) -> str:
    """How many claims of each paper have which verdict."""
    lines = ["| claims of | " + " | ".join(WORDS) + " |", "|---|" + "---:|" * len(WORDS)]
    for paper in PAPERS:
        counts: Counter[str] = Counter()
        for part in paper.parts:
            if not part.is_counted:
                continue
            record = records.get(part.experiment)
            for claim in part.claims:
                verdict = verdict_of(claim, record, EXPERIMENTS[part.experiment])
                counts[verdict.word if verdict else NOT_RUN] += 1
        link = paper.name.lower()
        lines.append(
            f"| [{paper.name}](#{link}) | " + " | ".join(str(counts[word]) for word in WORDS) + " |"
        )
    lines += [
        "",
        "A claim that two experiments test counts twice. Variants of ours do not count. Neither do",
        "the mixtures that were trained for nine steps.",
    ]
    return "\n".join(lines)


def _section(paper: Paper, part: Part, record: Record | None) -> list[str]:
    """The table of an experiment, after what was run."""
    experiment = EXPERIMENTS[part.experiment]
    title = f"### {paper.name}: {part.title}"
    about = f"[More about this experiment]({experiment.page}). {experiment.splits}"
    if record is None:
        command = f"`make claims SCALE=small ONLY={part.experiment}`"
        rows = [f"| {claim.where} | {claim.says} | {claim.paper} |" for claim in part.claims]
        table = ["| where | the paper says | its numbers |", "|---|---|---|", *rows]
        text = (
            f"**Not run.** {command} would do it. {about} What that page shows of it is of an "
            "earlier run, whose numbers were not kept as JSON."
        )
        return [title, text, "\n".join(table)]
    lines = [
        "| where | the paper says | its numbers | ours | difference | seeds, tasks | verdict |",
        "|---|---|---|---|---:|---|---|",
    ]
    reasons = []
    for claim in part.claims:
        verdict = verdict_of(claim, record, experiment)
        lines.append(_line(claim, verdict, record, experiment))
        reason = record.reasons.get(claim.name)
        if reason and verdict and verdict.word == FAILS:
            reasons.append(f"- {claim.says}: {reason}")
    parts = [title, f"    {record.command}", f"{_run(record)} {about}"]
    if record.note:
        parts.append(record.note)
    parts.append("\n".join(lines))
    if reasons:
        parts.append("Why not:\n\n" + "\n".join(reasons))
    return parts


def _run(record: Record) -> str:
    """How long a run took, and with what."""
    if record.seconds is None:
        time = "Its time was not taken."
    elif record.seconds < 120:
        time = f"It took {record.seconds:.0f} seconds."
    else:
        time = f"It took {record.seconds / 60:.0f} minutes."
    names = {"mergekit-moe-ext": "this package"}
    versions = ", ".join(
        f"{names.get(package, package)} {number}" for package, number in record.versions.items()
    )
    return f"Scale `{record.scale}`. {time} ({versions})"


def _line(claim: Claim, verdict: Verdict | None, record: Record, experiment: Experiment) -> str:
    """The row of a claim."""
    if verdict is None:
        cells = [claim.where, claim.says, claim.paper, "", "", "", NOT_RUN]
        return "| " + " | ".join(cells) + " |"
    factor = 100 if experiment.percent else 1
    digits = 1 if experiment.percent else 3
    difference = f"{factor * verdict.mean:+.{digits}f}"
    if verdict.error is not None:
        difference += f" ± {factor * verdict.error:.{digits}f}"
    if claim.slack:
        difference += f" (with {factor * claim.slack:.{digits}f} allowed)"
    counts = verdict.seeds
    if len(verdict.of_tasks) > 1:
        counts += f", {verdict.tasks}"
    ours = ""
    if claim.better:
        tasks = claim.tasks or experiment.tasks
        means = []
        for row in (claim.better, claim.worse):
            means.append(_mean(record.rows[row], tasks, factor, digits))
        ours = ", ".join(means)
    cells = [claim.where, claim.says, claim.paper, ours, difference, counts, f"**{verdict.word}**"]
    return "| " + " | ".join(cells) + " |"


def _mean(
    of_seeds: Mapping[str, Mapping[str, float]], tasks: Sequence[str], factor: int, digits: int
) -> str:
    """The mean over seeds of the mean over tasks, with its standard deviation."""
    means = []
    for of_seed in of_seeds.values():
        means.append(factor * statistics.mean(of_seed[task] for task in tasks))
    text = f"{statistics.mean(means):.{digits}f}"
    if len(means) > 1:
        text += f" ± {statistics.stdev(means):.{digits}f}"
    return text
