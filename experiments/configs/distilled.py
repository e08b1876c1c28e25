"""Teachers of a generator: SASRec, the item graph, or both.

    python -m experiments distilled default --dataset ../shared/data/amazon14_beauty

The default generator with a cross-entropy to the 32 best items of a teacher, level by level (after UniGRec, arXiv
2601.17438). The graph ranks leave-one-out: without the counts of the history itself. Measured on the small
simulated catalogue: docs/results.md. In the recipe, whose generators are taught by both, validation preferred that to
SASRec alone.
"""

from experiments.experiment import Experiment
from semid.generators import GeneratorConfig, ObjectiveConfig
from semid.tokenizers import TokenizerConfig


def _taught(title: str, teacher: str, *, graph: str | None = None, share: float = 0.0) -> Experiment:
    generator = GeneratorConfig(objective=ObjectiveConfig(distillation=1.0, teacher_graph=share))
    return Experiment(
        f"semid, defaults, taught by {title}",
        generator,
        TokenizerConfig(),
        teacher=teacher,
        graph=graph,
        paper="after UniGRec, arXiv 2601.17438",
        expected="above default",
    )


def config() -> dict[str, Experiment]:
    return {
        "sasrec": _taught("SASRec", "recipe.sasrec-text"),
        "graph": _taught("the item graph", "item-graph"),
        "both": _taught("both", "recipe.sasrec-text", graph="item-graph", share=0.5),
    }
