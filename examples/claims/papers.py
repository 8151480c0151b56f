"""The papers' claims in their own terms, with the papers' numbers, and what of ours judges them."""

import itertools
from dataclasses import dataclass

from caem_switch.experiment import CONFIGURATIONS


@dataclass(frozen=True)
class Claim:
    """One claim of a paper.

    where, says: the place in the paper, and what it says.
    paper: the paper's own numbers; empty where it gives a figure or words alone.
    better, worse: the rows that are compared; `better` is above `worse`, or has the lower loss.
    tasks: over which tasks; all of the experiment's if empty.
    margin: the name of a margin in the record, which is judged in place of two rows.
    slack: how far `better` may be behind and the claim still hold, for "as good as".
    is_drawn: whether anything in the rows is drawn at random.
    """

    where: str
    says: str
    paper: str
    better: str = ""
    worse: str = ""
    tasks: tuple[str, ...] = ()
    margin: str = ""
    slack: float = 0.0
    is_drawn: bool = True

    @property
    def name(self) -> str:
        return f"{self.where}: {self.says}"


@dataclass(frozen=True)
class Part:
    """The claims of a paper that one experiment judges.

    is_counted: whether the overview counts its verdicts. Not those of a variant of ours, and not
        where the training was too short, and its learning rates unsearched, for a claim about it.
    """

    experiment: str
    title: str
    claims: tuple[Claim, ...]
    is_counted: bool = True


@dataclass(frozen=True)
class Paper:
    name: str
    link: str
    of_paper: str  # what its numbers are
    parts: tuple[Part, ...]


def _caem(where: str, says: str, paper: str) -> Claim:
    """A claim whose margin has the name that CAEM's report has for it. Where it is about two rows,
    these are shown, too.
    """
    better, _, worse = says.partition(" is above ")
    if worse not in CONFIGURATIONS:
        better = worse = ""
    return Claim(where, says, paper, better, worse, margin=f"{where}: {says}")


CAEM = Paper(
    "CAEM-MoE",
    "https://openreview.net/forum?id=ghf55P3miM",
    "Overall Performance, the mean over tasks of the score by that of a single-task one; one run.",
    (
        Part(
            "caem_switch",
            "Switch Transformers, pretrained here",
            (
                _caem("Table 2", "CAEM-8 is above Baseline-8", "1.0056, 0.9862"),
                _caem("Table 2", "CAEM-16 is above Baseline-16", "1.0007, 0.9881"),
                _caem("Table 2", "CAEM-8-to-16 is above Baseline-16", "1.0012, 0.9881"),
                _caem("Table 2", "CAEM-8 is the best of all", "1.0056, next 1.0012"),
                _caem("Table 2", "CAEM-8 is above CAEM-8-to-16", "1.0056, 1.0012"),
                _caem("Table 2", "CAEM-8-to-16 is above CAEM-16", "1.0012, 1.0007"),
                _caem("Table 2", "CAEM-8 is above CAEM-8-Avg", "1.0056, 0.9986"),
                _caem("Table 2", "CAEM-16 is above CAEM-16-Avg", "1.0007, 0.9990"),
                _caem("Table 2", "CAEM-8-Avg is above Baseline-8", "0.9986, 0.9862"),
                _caem(
                    "Table 2",
                    "CAEM-8 gains most on generation",
                    "+6.47% on XSum, -0.16% on AG News",
                ),
                _caem(
                    "Table 2",
                    "CAEM-8 is above CAEM-8-Avg on generation",
                    "XSum 31.26, 30.68",
                ),
                _caem("3.2", "generation has a higher entropy than classification", ""),
                _caem(
                    "Table 3",
                    "in the encoder CAEM-8 is highest, CAEM-8-to-16 lowest",
                    "0.4524, 0.3966, 0.3345",
                ),
                _caem(
                    "Table 3",
                    "in the decoder CAEM-8 is highest, CAEM-16 lowest",
                    "0.5923, 0.5312, 0.4677",
                ),
                _caem(
                    "Table 4",
                    "every soup keeps 80% of the worse model",
                    "0.8531 to 0.9337",
                ),
                _caem("Table 4", "CAEM-8 with CAEM-8-Avg is the best soup", "0.8880, next 0.8592"),
                _caem(
                    "Table 4", "CAEM-16 with CAEM-16-Avg is the best soup", "0.9337, next 0.9035"
                ),
                _caem("Table 5", "every soup falls below 0.1", "0.0000 to 0.0011"),
                _caem("Figure 2", "training brings encoders together (8 experts)", ""),
                _caem("Figure 2", "training brings encoders together (16 experts)", ""),
                _caem("Figure 2", "training brings decoders together (8 experts)", ""),
                _caem("Figure 2", "training drives decoders apart (16 experts)", ""),
                _caem(
                    "Figure 4",
                    "CAEM-8-to-16 is nearer to CAEM-8 than to CAEM-16",
                    "above 0.999 for XSum",
                ),
                _caem("Figure 4", "CAEM-8-to-16 is nearer to Baseline-16 than to CAEM-16", ""),
            ),
        ),
    ),
)


def _mixture(where: str, better: str, worse: str, paper: str, says: str = "") -> Claim:
    return Claim(where, says or f"{better} is better than {worse}", paper, better, worse)


def _hetero(kind: str) -> tuple[Claim, ...]:
    """Table 4's claims of a mixture with projectors or embeddings of one kind."""
    row = f"{kind}, after"
    music = ("music",)
    note = "" if kind == "random projectors" else f" ({kind})"
    return (
        Claim(
            "Table 4",
            f"the mixture is better than the best dense model in the mean{note}",
            "13.34, 10.44 and 11.17, 7.81",
            row,
            "best dense model in the mean",
        ),
        Claim(
            "Table 4",
            f"it beats three experts trained on the same texts in the mean{note}",
            "13.34 and 11.17, 10.54",
            row,
            "3 experts, after",
        ),
        Claim(
            "Table 4",
            f"it beats three experts trained without the domain in the mean{note}",
            "13.34 and 11.17, 10.88",
            row,
            "3 experts, no music, after",
        ),
        Claim(
            "Table 4",
            f"in the domain of the foreign expert, it beats three experts trained on it{note}",
            "GSM8K 6.29 and 6.14, 5.16",
            row,
            "3 experts, after",
            music,
        ),
        Claim(
            "Table 4",
            f"in that domain, it beats three experts trained without it{note}",
            "GSM8K 6.29 and 6.14, 1.74",
            row,
            "3 experts, no music, after",
            music,
        ),
        Claim(
            "Table 4",
            f"in that domain, it is as good as the foreign expert or better{note}",
            "GSM8K 6.29, 5.91 and 6.14, 5.08",
            row,
            "music expert",
            music,
        ),
    )


TABLE_1 = (
    _mixture("Table 1", "BTX merging", "Random routing", "11.72, 6.92"),
    _mixture("Table 1", "BTX merging", "Router fine-tuning", "11.72, 7.92"),
    _mixture("Table 1", "Ties merging", "BTX merging", "12.52, 11.72"),
    _mixture("Table 1", "Dare merging", "BTX merging", "12.86, 11.72"),
    _mixture("Table 1", "Dare merging", "Ties merging", "12.86, 12.52"),
    _mixture("Table 1", "MoE upcycling", "Dare merging", "16.05, 12.86"),
)
TABLE_3 = (
    _mixture(
        "Table 3",
        "separate attention, perplexity, K=2",
        "Random routing",
        "8.08, 6.92",
        "separate attention with perplexity is better than random routing",
    ),
    _mixture(
        "Table 3",
        "separate attention, perplexity, K=2",
        "Dare dense",
        "8.08, 7.11",
        "it is better than the models merged by DARE",
    ),
    _mixture(
        "Table 3",
        "separate attention, perplexity, K=2",
        "Ties dense",
        "8.08, 6.98",
        "it is better than the models merged by TIES",
    ),
    _mixture(
        "Table 3",
        "separate attention, perplexity, K=2",
        "merged attention, perplexity, K=2",
        "8.08, 7.32",
        "by perplexity, separate attention is better than merged",
    ),
    _mixture(
        "Table 3",
        "merged attention, task vector, K=2",
        "separate attention, task vector, K=2",
        "7.24, 7.05",
        "by task vectors, merged attention is better than separate",
    ),
    _mixture(
        "Table 3",
        "separate attention, perplexity, K=2",
        "separate attention, task vector, K=2",
        "8.08, 7.05",
        "perplexity is better than task vectors",
    ),
)

MERGEME = Paper(
    "MergeME",
    "https://arxiv.org/abs/2502.00997",
    "Accuracies on six benchmarks, mostly their average; one run. Ours are held-out losses.",
    (
        Part(
            "mergeme_homogeneous",
            "mixtures of SmolLM2-135M-Instruct, trained for nine steps: too few to judge",
            TABLE_1,
            is_counted=False,
        ),
        Part(
            "mergeme_small",
            "mixtures of a small Llama that is pretrained here, trained for 144 steps",
            TABLE_1,
        ),
        Part(
            "mergeme_sequence",
            "without training (rows of K = 2, as in the paper)",
            TABLE_3,
        ),
        Part(
            "mergeme_sequence_small",
            "the same with three small Llamas and their experts, which were trained for 360 steps",
            TABLE_3,
        ),
        Part(
            "mergeme_hetero",
            "an expert of another architecture and tokenizer",
            _hetero("random projectors"),
        ),
        Part(
            "mergeme_hetero",
            "the same with other embeddings and projectors, which are not the paper's",
            (*_hetero("identity projectors"), *_hetero("own embeddings")),
            is_counted=False,
        ),
    ),
)


def _above(better: str, worse: str, paper: str, where: str = "Table 2") -> Claim:
    return Claim(where, f"{better} is above {worse}", paper, better, worse)


# One point, as far as "comparable" or "not significant" can be put into a number.
AS_GOOD = 0.01
INDIVIDUAL = _above("Individual", "Pre-trained", "90.5, 48.1")
TRADITIONAL = _above("WEMoE (2-layer)", "Traditional MTL", "89.4, 88.9")
STATIC = (
    _above("Weight averaging", "Pre-trained", "66.0, 48.1"),
    _above("Task arithmetic", "Weight averaging", "69.0, 66.0"),
    _above("Ties-Merging", "Task arithmetic", "72.8, 69.0"),
)
BASELINES = (
    _above("Fisher merging", "Weight averaging", "68.3, 66.0"),
    _above("RegMean", "Fisher merging", "71.8, 68.3"),
    _above("RegMean", "Task arithmetic", "71.8, 69.0"),
    _above("AdaMerging++ (task)", "AdaMerging (task)", "73.7, 70.7"),
    _above("AdaMerging++ (layer)", "AdaMerging (layer)", "81.1, 80.9"),
)
ADAPTED = (
    _above("AdaMerging (layer)", "AdaMerging (task)", "80.9, 70.7"),
    _above("AdaMerging (layer)", "Ties-Merging", "80.9, 72.8"),
    _above("WEMoE (2-layer)", "Task arithmetic", "89.4, 69.0"),
    _above("WEMoE (2-layer)", "Ties-Merging", "89.4, 72.8"),
    _above("WEMoE (2-layer)", "AdaMerging (layer)", "89.4, 80.9"),
    _above("Individual", "WEMoE (2-layer)", "90.5, 89.4"),
)


def _at_another_rate(row: str) -> tuple[Claim, ...]:
    """The claims about WEMoE, of routers that were adapted at another rate."""
    return (
        _above(row, "Task arithmetic", "89.4, 69.0"),
        _above(row, "Ties-Merging", "89.4, 72.8"),
        _above(row, "AdaMerging (layer)", "89.4, 80.9"),
        _above(row, "WEMoE (0-layer)", "93.2, 84.6 (four tasks)", "Table 5, clean"),
        _above("Individual", row, "90.5, 89.4"),
    )


SEEN = ("mnist", "letters")  # of which Table 4's models are merged
UNSEEN = ("animals", "digits8")


def _of_table4(better: str, worse: str, paper: str, tasks: tuple[str, ...] = UNSEEN) -> Claim:
    kind = "unseen" if tasks == UNSEEN else "seen"
    says = f"{better} is above {worse} on {kind} tasks"
    return Claim("Table 4", says, paper, f"table4: {better}", f"table4: {worse}", tasks=tasks)


TABLE_4 = (
    _of_table4("WEMoE (2-layer)", "AdaMerging (layer)", "86.5, 77.4", SEEN),
    _of_table4("WEMoE (2-layer)", "AdaMerging (layer)", "71.1, 70.0"),
    _of_table4("AdaMerging (layer)", "WEMoE (0-layer)", "70.0, 64.2"),
    _of_table4("WEMoE (0-layer)", "Task arithmetic", "64.2, 61.4"),
    _of_table4("Task arithmetic", "Ties-Merging", "61.4, 59.5"),
)
# The rows that Table 5 compares, and its averages over four tasks in that order.
COMPARED = (
    "WEMoE (2-layer), constant 1e-4",
    "AdaMerging (layer), 1e-2",
    "Task arithmetic",
    "Ties-Merging",
)
OF_CORRUPTION = {
    "motion blur": (87.6, 80.6, 69.4, 64.0),
    "impulse noise": (67.3, 62.8, 56.1, 52.3),
    "gaussian noise": (69.5, 66.9, 61.1, 57.2),
    "pixelate": (27.3, 42.3, 33.4, 30.6),
    "spatter": (72.9, 69.6, 62.9, 57.8),
    "contrast": (86.9, 79.0, 68.9, 64.4),
    "jpeg compression": (87.6, 80.1, 70.3, 64.5),
}


def _of_table5() -> tuple[Claim, ...]:
    """The order of each two neighbouring rows, on each corruption."""
    claims = []
    for corruption, averages in OF_CORRUPTION.items():
        of_paper = dict(zip(COMPARED, averages, strict=True))
        for first, second in itertools.pairwise(COMPARED):
            better, worse = sorted((first, second), key=lambda row: -of_paper[row])
            short_names = [row.partition(",")[0] for row in (better, worse)]
            suffix = f", {corruption.replace(' ', '_')}"
            claims.append(
                Claim(
                    f"Table 5, {corruption}",
                    f"{short_names[0]} is above {short_names[1]}",
                    f"{of_paper[better]}, {of_paper[worse]}",
                    f"table5: {better}{suffix}",
                    f"table5: {worse}{suffix}",
                )
            )
    return tuple(claims)


def _of_table6(rate: str) -> tuple[Claim, ...]:
    """The order of what is routed, at a rate."""
    return (
        Claim(
            "Table 6",
            "attention and MLPs are better routed than MLPs alone",
            "89.2, 88.3",
            f"table6: Attention + MLP{rate}",
            f"table6: MLP only{rate}",
        ),
        Claim(
            "Table 6",
            "MLPs alone are better routed than entire blocks",
            "88.3, 86.4",
            f"table6: MLP only{rate}",
            f"table6: Entire block{rate}",
        ),
    )


def _of_figure4(rate: str, other: str) -> Claim:
    """That a rate of adaptation matters little: it is about as good as another."""
    return Claim(
        "Figure 4",
        f"a constant rate of {rate} is at most one point below {other}",
        '"not significant"',
        f"figure4: {rate}",
        f"figure4: {other}",
        slack=AS_GOOD,
    )


def _of_figure5(scale: str, other: str) -> Claim:
    """That WEMoE is above another row at one lambda."""
    return Claim(
        "Figure 5",
        f"at λ = {scale}, WEMoE (2-layer) is above {other}",
        "",
        f"figure5: WEMoE (2-layer), {scale}",
        f"figure5: {other}, {scale}",
    )


def _stable_from(scale: str, other: str) -> Claim:
    return Claim(
        "Figure 5",
        f"at λ = {scale}, WEMoE (2-layer) is at most one point below λ = {other}",
        '"relatively stable"',
        f"figure5: WEMoE (2-layer), {scale}",
        f"figure5: WEMoE (2-layer), {other}",
        slack=AS_GOOD,
    )


SWEEPS = (
    _of_figure4("0.01", "0.001"),
    _of_figure4("0.0001", "0.001"),
    _stable_from("0.1", "0.3"),
    _stable_from("0.6", "0.3"),
    _stable_from("1.0", "0.3"),
)
# Of these the paper says nothing in words.
AT_EACH_LAMBDA = (
    _of_figure5("0.1", "Task arithmetic"),
    _of_figure5("0.1", "Ties-Merging"),
    _of_figure5("0.3", "Task arithmetic"),
    _of_figure5("0.3", "Ties-Merging"),
    _of_figure5("0.6", "Task arithmetic"),
    _of_figure5("0.6", "Ties-Merging"),
    _of_figure5("1.0", "Task arithmetic"),
    _of_figure5("1.0", "Ties-Merging"),
)
DEPTH = (
    _above("WEMoE (2-layer)", "WEMoE (1-layer)", "89.4, 88.3", "Table 10"),
    _above("WEMoE (1-layer)", "AdaMerging (layer)", "88.3, 80.9", "Table 10"),
)
NO_ROUTING = (
    Claim(
        "Table 5, clean",
        "WEMoE (2-layer) is above WEMoE (0-layer)",
        "93.2, 84.6 (four tasks)",
        "WEMoE (2-layer)",
        "WEMoE (0-layer)",
    ),
)

WEMOE = Paper(
    "WEMoE",
    "https://arxiv.org/abs/2402.00433",
    "Accuracy in percent, the average over eight tasks, CLIP ViT-B/32. One run.",
    (
        Part(
            "wemoe_pretrained",
            "DINOv2's ViT-S/14, four tasks",
            (
                INDIVIDUAL,
                *STATIC,
                *BASELINES,
                *ADAPTED,
                _above("WEMoE (2-layer)", "AdaMerging++ (layer)", "89.4, 81.1"),
                *DEPTH,
                *NO_ROUTING,
            ),
        ),
        Part(
            "wemoe_pretrained",
            "the same with routers at 3e-3 falling by a cosine, the best on validation images",
            _at_another_rate("WEMoE (2-layer), 3e-3"),
        ),
        Part(
            "wemoe_pretrained",
            "the same with routers at a constant rate of 1e-4, as in FusionBench",
            _at_another_rate("WEMoE (2-layer), constant 1e-4"),
        ),
        Part(
            "wemoe_pretrained",
            "the same, with two of the tasks merged and two unseen",
            TABLE_4,
        ),
        Part(
            "wemoe_pretrained",
            "the same on corrupted test images, at low rates (1e-2 and a constant 1e-4)",
            _of_table5(),
        ),
        Part(
            "wemoe_pretrained",
            "the same, by what is routed, with routers of one layer",
            _of_table6(""),
        ),
        Part(
            "wemoe_pretrained",
            "the same at a constant rate of 1e-4",
            _of_table6(", constant 1e-4"),
        ),
        Part(
            "wemoe_pretrained",
            "the same by the constant rate of adaptation, and by λ",
            SWEEPS,
        ),
        Part(
            "wemoe_pretrained",
            "the same beside others at each λ, of which the paper has a figure alone",
            AT_EACH_LAMBDA,
            is_counted=False,
        ),
        Part(
            "wemoe_pretrained_linear",
            "the same network with linear heads, which CLIP does not have",
            _at_another_rate("WEMoE (2-layer)"),
        ),
        Part(
            "wemoe_pretrained_linear",
            "the same with routers at a constant rate of 1e-4",
            _at_another_rate("WEMoE (2-layer), constant 1e-4"),
        ),
        Part(
            "wemoe_images",
            "a vision transformer of 0.8 million parameters, pretrained here, four tasks",
            (INDIVIDUAL, TRADITIONAL, *STATIC, *BASELINES, *ADAPTED, *NO_ROUTING),
        ),
        Part(
            "wemoe_texts",
            "a decoder on three kinds of text (the paper has images alone; here a row is better "
            "with the lower loss)",
            (
                _mixture("Table 2", "WEMoE, 2 layers", "task arithmetic", "89.4, 69.0"),
                _mixture("Table 2", "WEMoE, 2 layers", "AdaMerging, layer-wise", "89.4, 80.9"),
                _mixture("Table 10", "WEMoE, 2 layers", "WEMoE, 1 layer", "89.4, 88.3"),
            ),
        ),
    ),
)

EWEMOE = Paper(
    "E-WEMoE",
    "https://arxiv.org/abs/2410.21804",
    "Only a summary of this paper was at hand, which gives no accuracies.",
    (
        Part(
            "wemoe_pretrained",
            "DINOv2's ViT-S/14, four tasks",
            (
                _above("E-WEMoE 0.9", "AdaMerging (layer)", "", "key results"),
                _above("E-WEMoE 0.9", "Ties-Merging", "", "key results"),
                Claim(
                    "key results",
                    "with 90% of the task vectors dropped, it is at most one point below WEMoE",
                    '"comparable"',
                    "E-WEMoE 0.9",
                    "WEMoE (2-layer)",
                    slack=AS_GOOD,
                ),
            ),
        ),
        Part(
            "wemoe_images",
            "a vision transformer of 0.8 million parameters, pretrained here, four tasks",
            (
                _above("E-WEMoE 0.9", "AdaMerging (layer)", "", "key results"),
                Claim(
                    "key results",
                    "with 90% of the task vectors dropped, it is at most one point below WEMoE",
                    '"comparable"',
                    "E-WEMoE 0.9",
                    "WEMoE (2-layer)",
                    slack=AS_GOOD,
                ),
            ),
        ),
    ),
)


def _fusion(
    where: str, says: str, better: str, worse: str, paper: str = "", is_drawn: bool = False
) -> Claim:
    return Claim(where, says, paper, better, worse, is_drawn=is_drawn)


TRADEOFFS = Paper(
    "Trade-offs",
    "https://arxiv.org/abs/2603.03535",
    "Test loss, the mean over 256 tasks; most claims are bars of a figure, without numbers.",
    (
        Part(
            "tradeoffs_report",
            "eight LoRA adapters of SmolLM2-135M-Instruct",
            (
                _fusion(
                    "Figure 2", "nothing beats the oracle", "own_expert", "linear", is_drawn=True
                ),
                _fusion(
                    "Figure 2",
                    "learned routing beats learned ensembling",
                    "linear",
                    "learned_ensemble",
                    is_drawn=True,
                ),
                _fusion(
                    "Figure 2",
                    "learning improves the ensemble",
                    "learned_ensemble",
                    "uniform_ensemble",
                ),
                _fusion(
                    "Figure 2",
                    "learned ensembling beats learned merging",
                    "learned_ensemble",
                    "global",
                    is_drawn=True,
                ),
                _fusion(
                    "Figure 2",
                    "uniform ensembling beats uniform merging",
                    "uniform_ensemble",
                    "uniform_low_rank",
                ),
                _fusion(
                    "Figure 2",
                    "uniform ensembling beats the shared expert",
                    "uniform_ensemble",
                    "shared expert",
                ),
                _fusion(
                    "Figure 2",
                    "uniform merging beats the shared expert alone",
                    "uniform_low_rank",
                    "shared expert",
                ),
                _fusion(
                    "Figure 2", "Arrow beats uniform merging", "arrow_top4", "uniform_low_rank"
                ),
                _fusion(
                    "Figure 2",
                    "learning improves the merge",
                    "global",
                    "uniform_low_rank",
                    is_drawn=True,
                ),
                _fusion(
                    "Figure 2",
                    "global merging beats merging per layer",
                    "global",
                    "layer",
                    is_drawn=True,
                ),
                _fusion(
                    "Figure 2",
                    "learned routing beats learned merging",
                    "linear",
                    "global",
                    is_drawn=True,
                ),
                _fusion(
                    "Figure 2", "learned routing beats Arrow", "linear", "arrow_top4", "", True
                ),
                _fusion(
                    "Figure 2",
                    "Arrow is the better start for clusters",
                    "hierarchical_arrow",
                    "hierarchical",
                    is_drawn=True,
                ),
                _fusion(
                    "Figure 2",
                    "clusters from Arrow beat all merging",
                    "hierarchical_arrow",
                    "global",
                    is_drawn=True,
                ),
                _fusion(
                    "Figure 4",
                    "the oracle is better with experts of clusters",
                    "MBC own_expert",
                    "own_expert",
                ),
                _fusion(
                    "Figure 4",
                    "so is uniform ensembling",
                    "MBC uniform_ensemble",
                    "uniform_ensemble",
                ),
                _fusion(
                    "Figure 4",
                    "so is uniform merging",
                    "MBC uniform_low_rank",
                    "uniform_low_rank",
                ),
                _fusion(
                    "Figure 4",
                    "Arrow is better with private experts",
                    "arrow_top4",
                    "MBC arrow_top4",
                ),
                _fusion(
                    "Figure 5",
                    "probabilities are better than logits",
                    "uniform_ensemble",
                    "logit_ensemble",
                ),
                _fusion(
                    "Figure 5",
                    "full rank is a little better than low rank",
                    "uniform_full",
                    "uniform_low_rank",
                ),
                _fusion(
                    "B.4",
                    "Arrow needs more than one expert",
                    "arrow_top4",
                    "arrow_top1",
                    "lower by 0.303 (MBC experts)",
                ),
                _fusion(
                    "B.5",
                    "a program for the worst case costs the mean",
                    "uniform_ensemble",
                    "program_ensemble",
                    "0.990 ± 0.002, 1.150 ± 0.003",
                ),
            ),
        ),
    ),
)

PAPERS = (MERGEME, CAEM, WEMOE, EWEMOE, TRADEOFFS)
