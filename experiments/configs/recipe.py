"""The recommended recipe and its parts: the table of docs/results.md on Beauty.

    python -m experiments popularity bigram item-graph recipe --dataset ../shared/data/amazon14_beauty --seeds 0 1 2
    python -m experiments recipe --dataset ../shared/data/amazon14_beauty --ties shuffled    # the items of a day
    python -m experiments table runs/amazon14_beauty --baseline item-graph

    sasrec-text     full-softmax cross-entropy over ids and projected text vectors; the teacher of the generators
    semid-text      RQ-VAE codes of the text vectors; the generator reads codes and text vector
    semid-hybrid    residual k-means codes of [text ; vectors of sasrec-text], which the generator reads too, and an
                    item-id embedding (so it knows no cold items)

Each is measured alone and mixed with the item graph, inside the search. The generators are taught by sasrec-text and
the graph, half each, and have twice the default width: at width 64 they underfit these codes. Expected on Beauty (test
Recall@10): semid-hybrid + graph .117, seen items never recommended. `ablations` has what lacks a part.
"""

from experiments.experiment import CONTENT, TEACHER, Experiment
from semid.generators import GeneratorConfig, ObjectiveConfig
from semid.tokenizers import RQKmeansConfig, RQVaeConfig, TokenizerConfig
from semid.training import OptimizerConfig, TrainingConfig
from seq_models import DenseConfig, RQTransformerConfig, TransformerConfig

TEXT_CODES = TokenizerConfig(RQVaeConfig())
HYBRID_CODES = TokenizerConfig(RQKmeansConfig(), columns=(CONTENT, TEACHER))
TAUGHT = ObjectiveConfig(distillation=1.0, teacher_graph=0.5)


def sasrec(*, features: tuple[str, ...] | None, epochs: float) -> GeneratorConfig:
    """SASRec with full-softmax cross-entropy."""
    optimizer = OptimizerConfig(learning_rate=2e-3, weight_decay=0.03)
    return GeneratorConfig(
        DenseConfig(TransformerConfig(dropout=0.4)),
        features=features,
        training=TrainingConfig(epochs=epochs, batch_size=16, validate_every=2, patience=4, optimizer=optimizer),
    )


def generator(
    *,
    features: tuple[str, ...] | None = None,
    dropout: float,
    epochs: float,
    id_embedding: bool = False,
    objective: ObjectiveConfig = TAUGHT,
) -> GeneratorConfig:
    """The RQ-Transformer of twice the default width."""
    backbone = TransformerConfig(dim=128, heads=4, hidden=256, dropout=dropout)
    optimizer = OptimizerConfig(learning_rate=2e-3)
    return GeneratorConfig(
        RQTransformerConfig(backbone, id_embedding=id_embedding),
        features=features,
        objective=objective,
        training=TrainingConfig(epochs=epochs, batch_size=32, validate_every=2, patience=4, optimizer=optimizer),
    )


def hybrid(objective: ObjectiveConfig = TAUGHT) -> GeneratorConfig:
    """The generator of semid-hybrid."""
    return generator(features=(CONTENT, TEACHER), dropout=0.15, epochs=12, id_embedding=True, objective=objective)


def config() -> dict[str, Experiment]:
    return {
        "sasrec-text": Experiment(
            "SASRec-CE, ids + text vectors",
            sasrec(features=None, epochs=20),
            TEXT_CODES,  # it reads none of them
            graph="item-graph",
            expected="R@10 .102, with the graph .120",
            minutes=10,
        ),
        "semid-text": Experiment(
            "semid, text-only codes",
            generator(dropout=0.1, epochs=16),
            TEXT_CODES,
            teacher="recipe.sasrec-text",
            graph="item-graph",
            expected="R@10 .083, with the graph .114",
            minutes=11,
        ),
        "semid-hybrid": Experiment(
            "semid, hybrid",
            hybrid(),
            HYBRID_CODES,
            teacher="recipe.sasrec-text",
            graph="item-graph",
            expected="R@10 .091, with the graph .116",
            minutes=9,
        ),
    }
