"""Autoregressive transformers over discrete codes, the code trie, and beam search constrained to it."""

from seq_models.dense import DenseConfig, DenseTransformer
from seq_models.layers import TransformerConfig
from seq_models.rq_transformer import DepthCache, Inputs, RQTransformer, RQTransformerConfig
from seq_models.search import Beams, Normalization, beam_search, item_log_probs
from seq_models.trie import Children, CodeTrie

__all__ = [
    "Beams",
    "Children",
    "CodeTrie",
    "DenseConfig",
    "DenseTransformer",
    "DepthCache",
    "Inputs",
    "Normalization",
    "RQTransformer",
    "RQTransformerConfig",
    "TransformerConfig",
    "beam_search",
    "item_log_probs",
]
