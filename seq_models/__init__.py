"""Autoregressive transformers over discrete codes, the code trie, and beam search constrained to it."""

from seq_models.codes import CodeConfig, CodeModel
from seq_models.conditions import ConditionEncoder, Conditions, ConditionSizes
from seq_models.dense import DenseConfig, DenseTransformer
from seq_models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from seq_models.flat import FlatDecoder, FlatDecoderConfig
from seq_models.hybrid import HybridConfig, HybridTransformer
from seq_models.layers import Mixer, Precision, Remat, TransformerConfig, dropout, last_state, linear, split_key
from seq_models.limits import GroupLimits
from seq_models.losses import (
    code_cross_entropy,
    constrained_cross_entropy,
    cross_entropy,
    distillation,
    softmax_cross_entropy,
    weighted_mean,
)
from seq_models.masks import ItemMask
from seq_models.mixture import ItemNeighbors, Mixture
from seq_models.models import ItemModel, ModelConfig
from seq_models.noise import GumbelNoise, request_noise
from seq_models.parallel_heads import ParallelHeads, ParallelHeadsConfig
from seq_models.ranking import best_allowed, first_within
from seq_models.rq_transformer import RQTransformer, RQTransformerConfig
from seq_models.scoring import LeafBlocks, catalog_log_probs, item_log_probs
from seq_models.search import Beams, beam_search
from seq_models.sequences import SequenceEncoder, SequenceSizes
from seq_models.trie import Capacity, Children, CodeTrie
from seq_models.types import (
    Boosts,
    Inputs,
    ItemTables,
    Layout,
    Prefixes,
    RequestBatch,
    SoftmaxOver,
    TeacherItems,
    TopK,
    TrainingBatch,
)

__all__ = [
    "Beams",
    "Boosts",
    "Capacity",
    "Children",
    "CodeConfig",
    "CodeModel",
    "CodeTrie",
    "ConditionEncoder",
    "ConditionSizes",
    "Conditions",
    "DenseConfig",
    "DenseTransformer",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "FlatDecoder",
    "FlatDecoderConfig",
    "GroupLimits",
    "GumbelNoise",
    "HybridConfig",
    "HybridTransformer",
    "Inputs",
    "ItemMask",
    "ItemModel",
    "ItemNeighbors",
    "ItemTables",
    "Layout",
    "LeafBlocks",
    "Mixer",
    "Mixture",
    "ModelConfig",
    "ParallelHeads",
    "ParallelHeadsConfig",
    "Precision",
    "Prefixes",
    "RQTransformer",
    "RQTransformerConfig",
    "Remat",
    "RequestBatch",
    "SequenceEncoder",
    "SequenceSizes",
    "SoftmaxOver",
    "TeacherItems",
    "TopK",
    "TrainingBatch",
    "TransformerConfig",
    "beam_search",
    "best_allowed",
    "catalog_log_probs",
    "code_cross_entropy",
    "constrained_cross_entropy",
    "cross_entropy",
    "distillation",
    "dropout",
    "first_within",
    "item_log_probs",
    "last_state",
    "linear",
    "request_noise",
    "softmax_cross_entropy",
    "split_key",
    "weighted_mean",
]
