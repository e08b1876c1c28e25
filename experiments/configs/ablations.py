"""The recipe with a part taken away or made larger: what each part is worth.

    python -m experiments ablations recipe item-graph --dataset ../shared/data/amazon14_beauty --seeds 0 1 2

    no-content    the item graph without content edges
    repeats       recipe.sasrec-text whose softmax keeps the items of the history
    untaught      recipe.semid-hybrid without a teacher (its codes and input still have the vectors of sasrec-text)
    wide          recipe.sasrec-text of twice the width
    wide-hybrid   recipe.semid-hybrid with that one for its teacher and vectors

Measured for seed 0: docs/results.md.
"""

from dataclasses import replace

from experiments.configs import recipe
from experiments.experiment import Experiment
from semid.generators import ObjectiveConfig
from semid.graphs import ItemGraphConfig
from seq_models import DenseConfig, TransformerConfig


def config() -> dict[str, Experiment]:
    whole = recipe.config()
    dense, hybrid = (replace(whole[name], expected="", minutes=None) for name in ("sasrec-text", "semid-hybrid"))
    kept = replace(recipe.sasrec(features=None, epochs=20), objective=ObjectiveConfig(repeats=True))
    untaught = recipe.hybrid(ObjectiveConfig())
    wide = recipe.sasrec(features=None, epochs=20)
    wide = replace(wide, model=DenseConfig(TransformerConfig(dim=128, heads=4, hidden=256, dropout=0.4)))
    return {
        "no-content": Experiment("item graph without content", ItemGraphConfig(columns=())),
        "repeats": replace(dense, title="SASRec-CE, history kept in the softmax", model=kept),
        "untaught": replace(hybrid, title="semid, hybrid, untaught", model=untaught),
        "wide": replace(dense, title="SASRec-CE of twice the width", model=wide),
        "wide-hybrid": replace(hybrid, title="semid, hybrid, of the wide SASRec", teacher="ablations.wide"),
    }
