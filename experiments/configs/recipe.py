"""The recommended recipe and its parts: the table of docs/results.md on Beauty.

    python -m experiments popularity bigram item-graph recipe --dataset ../shared/data/amazon14_beauty --seeds 0 1 2
    python -m experiments recipe --dataset ../shared/data/amazon14_beauty --ties shuffled    # the items of a day
    python -m experiments table runs/amazon14_beauty --baseline item-graph

    sasrec-text     full-softmax cross-entropy over ids and projected text vectors; the teacher of the generators
    semid-text      RQ-VAE codes of the text vectors; the generator reads codes and text vector
    semid-hybrid    residual k-means codes of [text ; vectors of sasrec-text], which the generator reads too, and an
                    item-id embedding (so it knows no cold items)

Each is measured alone and mixed with the item graph, inside the search. All have twice the default width. The
generators are taught by SASRec and the graph, half each. semid-hybrid starts from sasrec-text's backbone and item
vectors; its softmax is over the codes that follow in the catalogue, as in the search; it has a wide depth decoder, and
a dense head with .6 of its probabilities. semid-text is older and has none of these; its teacher is `ablations.narrow`.
Expected on Beauty (test Recall@10): semid-hybrid .117, with the graph .124, seen items never recommended. `ablations`
lacks one part each.
"""

from dataclasses import replace

from experiments.experiment import CONTENT, TEACHER, Experiment
from semid.generators import GeneratorConfig, ObjectiveConfig
from semid.tokenizers import RQKmeansConfig, RQVaeConfig, TokenizerConfig
from semid.training import OptimizerConfig, TrainingConfig
from seq_models import DenseConfig, RQTransformerConfig, SoftmaxOver, TransformerConfig

TEXT_CODES = TokenizerConfig(RQVaeConfig())
HYBRID_CODES = TokenizerConfig(RQKmeansConfig(), columns=(CONTENT, TEACHER))
TAUGHT = ObjectiveConfig(distillation=1.0, teacher_graph=0.5)
AMONG_CHILDREN = replace(TAUGHT, normalization=SoftmaxOver.CHILDREN)


def sasrec(
    *, features: tuple[str, ...] | None, epochs: float, backbone: TransformerConfig = TransformerConfig(dropout=0.4)
) -> GeneratorConfig:
    """SASRec with full-softmax cross-entropy."""
    optimizer = OptimizerConfig(learning_rate=2e-3, weight_decay=0.03)
    return GeneratorConfig(
        DenseConfig(backbone),
        features=features,
        training=TrainingConfig(epochs=epochs, batch_size=16, validate_every=2, patience=4, optimizer=optimizer),
    )


def text() -> GeneratorConfig:
    """The generator of semid-text: the RQ-Transformer of twice the default width."""
    return GeneratorConfig(RQTransformerConfig(_wide(dropout=0.1)), objective=TAUGHT, training=_generator_training(16))


def hybrid(
    objective: ObjectiveConfig = AMONG_CHILDREN,
    *,
    start_from_teacher: bool = True,
    depth_hidden: int | None = 1024,
    dense_share: float = 0.0,
) -> GeneratorConfig:
    """The generator of semid-hybrid: the same with embeddings of ids and a wide depth decoder."""
    backbone = _wide(dropout=0.25)
    return GeneratorConfig(
        RQTransformerConfig(
            backbone, id_embedding=True, depth_hidden=depth_hidden, scaled_codes=True, dense_share=dense_share
        ),
        features=(CONTENT, TEACHER),
        objective=objective,
        start_from_teacher=start_from_teacher,
        training=_generator_training(12),
    )


def _generator_training(epochs: float) -> TrainingConfig:
    optimizer = OptimizerConfig(learning_rate=2e-3)
    return TrainingConfig(epochs=epochs, batch_size=32, validate_every=2, patience=4, optimizer=optimizer)


def _wide(dropout: float) -> TransformerConfig:
    return TransformerConfig(dim=128, heads=4, hidden=256, dropout=dropout)


def config() -> dict[str, Experiment]:
    return {
        "sasrec-text": Experiment(
            "SASRec-CE, ids + text vectors",
            sasrec(features=None, epochs=20, backbone=_wide(dropout=0.4)),
            TEXT_CODES,  # it reads none of them
            graph="item-graph",
            expected="R@10 .112, with the graph .124",
            minutes=10,
        ),
        "semid-text": Experiment(
            "semid, text-only codes",
            text(),
            TEXT_CODES,
            teacher="ablations.narrow",
            graph="item-graph",
            expected="R@10 .083, with the graph .114",
            minutes=11,
        ),
        "semid-hybrid": Experiment(
            "semid, recipe",
            hybrid(dense_share=0.6),
            HYBRID_CODES,
            teacher="recipe.sasrec-text",
            graph="item-graph",
            expected="R@10 .118, with the graph .125",
            minutes=6,
        ),
    }
