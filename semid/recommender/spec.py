"""`ModelSpec`: the settings that build a model of any family again, and the catalogues that it can recommend from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from flax import nnx

from semid import artifacts, config
from semid.catalog import SemanticCatalog
from semid.errors import SemidError
from semid.recommender.conditions import ConditionSpec
from semid.recommender.mixing import check_graph_weight
from semid.recommender.sequences import SequencesSpec
from seq_models import ItemModel, ModelConfig, SoftmaxOver

SPEC_FILE = "config.json"


@dataclass(frozen=True)
class ModelSpec:
    """Settings that build the model again, and that search with it as it was trained."""

    model: ModelConfig
    """The family and its sizes."""
    level_sizes: tuple[int, ...]
    """Codebook sizes of the catalogue."""
    num_items: int
    """Items of the catalogue."""
    num_features: int
    """Width of the dense input; 0: none."""
    max_history: int
    """Number of latest items of a history that it reads."""
    normalization: SoftmaxOver = SoftmaxOver.VOCABULARY
    """Set over which the probabilities of codes sum to one, in training and in search."""
    catalog: str = ""
    """Digest of the catalogue whose codes it was trained on; empty: not known."""
    columns: tuple[str, ...] = ()
    """Vector columns of the dense input, side by side; empty: none, or not known."""
    repeat_factor: float = 1.0
    """Factor on the model's probabilities of the history's items: 0 if items do not repeat in training."""
    graph_weight: float = 0.0
    """Share of the item graph's distribution in the recommender's; 0: there is none."""
    conditions: ConditionSpec | None = config.later_field(None)
    """Conditions on the next item that it was trained with; None: none."""
    sequences: SequencesSpec | None = config.later_field(None)
    """Further code sequences of the items that it reads; None: none."""
    trained_items: int | None = config.later_field(None)
    """Number of items that it was trained on, the first in a later version of the catalogue; None: all."""

    def __post_init__(self) -> None:
        config.check_range(self, "repeat_factor", at_least=0)
        check_graph_weight(self.graph_weight)

    def build(self, *, seed: int) -> ItemModel:
        """Build the model with parameters drawn by `seed`; those of conditions and sequences change none of the others.

        Raises SemidError for settings that its family does not support.
        """
        rngs = nnx.Rngs(seed)
        try:
            model = self.model.build(
                level_sizes=self.level_sizes, num_items=self.num_items, num_features=self.num_features, rngs=rngs
            )
            if self.conditions is not None:
                model.add_conditions(self.conditions.sizes, rngs=rngs)
            if self.sequences is not None:
                model.add_sequences(self.sequences.sizes, rngs=rngs)
        except ValueError as error:
            raise SemidError(str(error)) from error
        return model

    def incompatibility(self, own: SemanticCatalog, later: SemanticCatalog) -> str | None:
        """The reason why a model of the catalogue `own` cannot recommend from `later`; None: it can."""
        if reason := own.incompatibility_with(later):
            return reason
        new = later.num_active - int(later.active[later.rows(own.item_ids)].sum())
        if new and self.model.has_item_embeddings:
            return f"it learned a vector of each of its {len(own)} items and has none for the {new} appended"
        return None


def read_spec(folder: Path) -> ModelSpec:
    """Read the spec in a model's folder."""
    return config.from_dict(ModelSpec, artifacts.read_json(folder / SPEC_FILE), where=str(folder / SPEC_FILE))
