"""Ablations of the recipe: each variant lacks one part.

    python -m experiments ablations recipe item-graph --dataset ../shared/data/amazon14_beauty --seeds 0 1 2

    no-content     the item graph without content edges
    narrow         recipe.sasrec-text of half the width, the default
    repeats        narrow, whose softmax keeps the items of the history
    codes-alone    recipe.semid-hybrid without a dense head
    untaught       codes-alone without a teacher (its codes and input still have the vectors of sasrec-text)
    random-start   codes-alone from random parameters, taught
    narrow-depth   codes-alone whose depth decoder is as wide inside as the backbone
    vocabulary     codes-alone whose probabilities are over each level's whole vocabulary

All but `vocabulary` are measured: docs/results.md.
"""

from dataclasses import replace

from experiments.configs import recipe
from experiments.experiment import Experiment
from semid.generators import ObjectiveConfig
from semid.graphs import ItemGraphConfig
from seq_models import SoftmaxOver


def config() -> dict[str, Experiment]:
    whole = recipe.config()
    dense, hybrid = (replace(whole[name], expected="", minutes=None) for name in ("sasrec-text", "semid-hybrid"))
    narrow = recipe.sasrec(features=None, epochs=20)
    kept = replace(narrow, objective=ObjectiveConfig(repeats=True))
    untaught = recipe.hybrid(ObjectiveConfig(normalization=SoftmaxOver.CHILDREN), start_from_teacher=False)
    of_vocabulary = recipe.hybrid(recipe.TAUGHT)
    return {
        "no-content": Experiment("item graph without content", ItemGraphConfig(columns=())),
        "narrow": replace(dense, title="SASRec-CE of half the width", model=narrow),
        "repeats": replace(dense, title="SASRec-CE of half the width, history kept in the softmax", model=kept),
        "codes-alone": replace(hybrid, title="semid, recipe, codes alone", model=recipe.hybrid()),
        "untaught": replace(hybrid, title="semid, recipe, codes alone, untaught", model=untaught),
        "random-start": replace(
            hybrid,
            title="semid, recipe, codes alone, from random parameters",
            model=recipe.hybrid(start_from_teacher=False),
        ),
        "narrow-depth": replace(
            hybrid, title="semid, recipe, codes alone, narrow depth decoder", model=recipe.hybrid(depth_hidden=None)
        ),
        "vocabulary": replace(
            hybrid, title="semid, recipe, codes alone, softmax over the vocabulary", model=of_vocabulary
        ),
    }
