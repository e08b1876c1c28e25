"""semid: generative recommendation with semantic IDs in JAX."""

from semid.catalog import SemanticCatalog
from semid.data.dataset import Dataset
from semid.errors import SemidError
from semid.evaluation import evaluate
from semid.generator import GeneratorConfig, train_generator
from semid.recommender import Recommendations, Recommender
from semid.tokenization import tokenize
from semid.tokenizer import SemanticTokenizer, TokenizerConfig

__all__ = [
    "Dataset",
    "GeneratorConfig",
    "Recommendations",
    "Recommender",
    "SemanticCatalog",
    "SemanticTokenizer",
    "SemidError",
    "TokenizerConfig",
    "evaluate",
    "tokenize",
    "train_generator",
]
