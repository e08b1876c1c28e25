"""The worth of collaborative alignment: one generator on the codes of nine tokenizers, controls included.

    python -m experiments alignment --dataset ../shared/data/amazon14_beauty --seeds 0 1 2

The teacher is `recipe.sasrec-text`, one per seed:

    text             RQ-VAE codes of the content vectors
    letter           ... aligned with the teacher's item vectors (see letter.py)
    distill          ... aligned by regression on them, which counts more than content, since both share few codes
    das              ... users and items quantized together, in views of interests rid of popularity (DAS, CIKM 2025,
                     arXiv 2508.10584). The published system has industrial vectors and 3 x 512 codes, and its weights
                     are not published; here a user's content is the mean of the items', all six views have one weight
    concatenation    RQ-VAE codes of [content ; teacher's vectors], not aligned
    joint            ... aligned: regression, and co-consumed items find each other; nothing is reconstructed
    collaborative    RQ-VAE codes of the teacher's vectors alone
    random, shuffled controls of distill: its vectors are noise, or those of other items

Generator and budget are the same for all. Only the first four can encode an item without interactions: they read
content alone. Measured on Beauty before the history was left out (docs/results.md): text .0396, concatenation .0486,
joint .0507 Recall@10.
"""

from experiments.configs import letter
from experiments.experiment import CONTENT, TEACHER, Experiment, TeacherVectors
from semid.generators import GeneratorConfig
from semid.graphs import VectorColumn
from semid.tokenizers import AlignmentConfig, CooccurrenceConfig, DasConfig, DistillConfig, RQVaeConfig, TokenizerConfig
from semid.training import OptimizerConfig, TrainingConfig

_GENERATOR = GeneratorConfig(
    training=TrainingConfig(epochs=10, validate_every=5, optimizer=OptimizerConfig(learning_rate=3e-3))
)


def _aligned(
    *alignment: AlignmentConfig, reconstruction: float, columns: tuple[str, ...] = (CONTENT,)
) -> TokenizerConfig:
    method = RQVaeConfig(reconstruction=reconstruction)
    return TokenizerConfig(method, columns, alignment=alignment, signal=VectorColumn(TEACHER))


_BOTH = (CONTENT, TEACHER)
JOINT = _aligned(DistillConfig(), CooccurrenceConfig(), reconstruction=0.0, columns=_BOTH)


def config() -> dict[str, Experiment]:
    distill = _aligned(DistillConfig(), reconstruction=0.2)
    tokenizers = {
        "text": TokenizerConfig(),
        "letter": letter.tokenizer(RQVaeConfig(diversity=1e-4)),
        "distill": distill,
        "das": _aligned(DasConfig(), reconstruction=1.0),
        "concatenation": TokenizerConfig(columns=_BOTH),
        "joint": JOINT,
        "collaborative": TokenizerConfig(columns=(TEACHER,)),
        "random": distill,
        "shuffled": distill,
    }
    controls = {"random": TeacherVectors.NOISE, "shuffled": TeacherVectors.SHUFFLED}
    papers = {"letter": letter.PAPER, "das": "CIKM 2025, arXiv 2508.10584"}
    return {
        name: Experiment(
            f"codes: {name}",
            _GENERATOR,
            tokenizer,
            teacher="recipe.sasrec-text",
            vectors=controls.get(name, TeacherVectors.OWN),
            paper=papers.get(name, ""),
        )
        for name, tokenizer in tokenizers.items()
    }
