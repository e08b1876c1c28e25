"""Two code sequences of an item, of its text and of its behavior, and which of them is generated (MSCGRec).

    python -m experiments mscgrec item-graph --dataset ../shared/data/amazon14_beauty --seeds 0
    python -m experiments mscgrec.both-behavior --dataset ... --model.drop-sequences 0    # none is left out

    text             one sequence, of the text vectors
    behavior         one sequence, of the item vectors of recipe.sasrec-text
    both-text        both are read, that of the text is generated
    both-behavior    both are read, that of the behavior is generated, as in the paper
    concatenation    one sequence, of both vectors side by side
    joint            the same, by an RQ-VAE that is aligned with users (`alignment.joint`)

Residual k-means of three levels (but the last), RQ-Transformers of the default size, 12 epochs, no vectors as input,
each measured alone and with the item graph. Under `--budget cpu` the tokenizer of `joint` keeps its 50 epochs by
`mscgrec.joint --tokenizer.method.training.epochs 150`, of which it trains a third. The paper (arXiv 2602.03713) has T5,
a position for each code and a third sequence from images; it reports Recall@10 .0315 on Beauty of 2023, where SASRec
has .0317. Measured on Beauty of 2014 (Recall@10, three seeds): text .0428, behavior .0592, both-text .0520,
both-behavior .0607; concatenation, seeds 0 and 2: .0597, .0583; joint, seed 2: .0583.
"""

from dataclasses import replace

from experiments.configs.alignment import JOINT
from experiments.configs.recipe import HYBRID_CODES
from experiments.experiment import CONTENT, TEACHER, Experiment
from semid.generators import GeneratorConfig
from semid.tokenizers import RQKmeansConfig, TokenizerConfig
from semid.training import OptimizerConfig, TrainingConfig

# Epochs of MovieLens-1M, which has seven times the interactions of Beauty: a third.
CPU = 1 / 3

TEXT = TokenizerConfig(RQKmeansConfig(), columns=(CONTENT,))
BEHAVIOR = TokenizerConfig(RQKmeansConfig(), columns=(TEACHER,))


def config() -> dict[str, Experiment]:
    training = TrainingConfig(epochs=12, batch_size=32, validate_every=3, optimizer=OptimizerConfig(learning_rate=2e-3))
    text = Experiment(
        "codes of text",
        GeneratorConfig(features=(), training=training),
        TEXT,
        graph="item-graph",
        cpu=CPU,
        paper="arXiv 2602.03713",
    )
    with_behavior = replace(text, teacher="recipe.sasrec-text")
    behavior = replace(with_behavior, title="codes of behavior", tokenizer=BEHAVIOR)
    return {
        "text": text,
        "behavior": behavior,
        "both-text": replace(with_behavior, title="codes of text, behavior read too", sequences={"behavior": BEHAVIOR}),
        "both-behavior": replace(behavior, title="codes of behavior, text read too", sequences={"text": TEXT}),
        "concatenation": replace(with_behavior, title="codes of text and behavior in one", tokenizer=HYBRID_CODES),
        "joint": replace(with_behavior, title="codes of text and behavior in one, aligned", tokenizer=JOINT),
    }
