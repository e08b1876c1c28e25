"""semid: generative recommendation with semantic IDs in JAX.

The public names are loaded on first use, so that `import semid` is cheap.
"""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

__version__ = "0.1.0"

_HOMES = {
    "Dataset": "semid.data",
    "GeneratorConfig": "semid.generators",
    "ItemGraph": "semid.graphs",
    "JointConfig": "semid.joint",
    "Recommendations": "semid.recommender",
    "Recommender": "semid.recommender",
    "SemanticCatalog": "semid.catalog",
    "SemanticTokenizer": "semid.tokenizers",
    "SemidError": "semid.errors",
    "TokenizerConfig": "semid.tokenizers",
    "evaluate": "semid.evaluation",
    "tokenize": "semid.tokenizers",
    "train": "semid.generators",
    "train_end_to_end": "semid.joint",
}
__all__ = sorted([*_HOMES, "__version__"])

if _TYPE_CHECKING:
    from semid.catalog import SemanticCatalog as SemanticCatalog
    from semid.data import Dataset as Dataset
    from semid.errors import SemidError as SemidError
    from semid.evaluation import evaluate as evaluate
    from semid.generators import GeneratorConfig as GeneratorConfig
    from semid.generators import train as train
    from semid.graphs import ItemGraph as ItemGraph
    from semid.joint import JointConfig as JointConfig
    from semid.joint import train_end_to_end as train_end_to_end
    from semid.recommender import Recommendations as Recommendations
    from semid.recommender import Recommender as Recommender
    from semid.tokenizers import SemanticTokenizer as SemanticTokenizer
    from semid.tokenizers import TokenizerConfig as TokenizerConfig
    from semid.tokenizers import tokenize as tokenize


def __getattr__(name: str) -> _Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'semid' has no attribute {name!r}")
    return getattr(_importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
