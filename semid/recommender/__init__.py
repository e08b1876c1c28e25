"""Recommenders: a trained model and its catalogue, from item ids to item ids."""

from semid.recommender.conditions import Condition, ConditionSpec, ItemConditions, encode_texts
from semid.recommender.explanation import Explanation
from semid.recommender.items import ItemData
from semid.recommender.lists import Sampling
from semid.recommender.packaging import DATASET_FILE, copy_tokenizer
from semid.recommender.recommendations import Recommendations
from semid.recommender.recommender import Recommender
from semid.recommender.scorers import Scorer
from semid.recommender.sequences import SequencesSpec, sequence_codes
from semid.recommender.spec import ModelSpec, read_spec
from semid.recommender.stablehlo import export_program

__all__ = [
    "DATASET_FILE",
    "Condition",
    "ConditionSpec",
    "Explanation",
    "ItemConditions",
    "ItemData",
    "ModelSpec",
    "Recommendations",
    "Recommender",
    "Sampling",
    "Scorer",
    "SequencesSpec",
    "copy_tokenizer",
    "encode_texts",
    "export_program",
    "read_spec",
    "sequence_codes",
]
