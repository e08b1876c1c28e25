"""Tokenizers: content vectors to semantic IDs."""

from semid.tokenizers.alignment import (
    AlignmentConfig,
    CooccurrenceConfig,
    DasConfig,
    DistillConfig,
    LetterConfig,
    MatchConfig,
)
from semid.tokenizers.autoencoder import RQVAE, Pass
from semid.tokenizers.blocks import BLOCK, map_blocks, pad_rows
from semid.tokenizers.kmeans import RQKmeansConfig
from semid.tokenizers.method import TokenizerMethod
from semid.tokenizers.product import ProductConfig
from semid.tokenizers.rq_dino import RqDinoLoss, rq_dino_loss
from semid.tokenizers.rqvae import AlignedRQVAE, ItemRows, RQVaeConfig, reseeding, train_autoencoder
from semid.tokenizers.tokenization import HEALTH_FILE, level_health, tokenize
from semid.tokenizers.tokenizer import SemanticTokenizer, TokenizerConfig

__all__ = [
    "BLOCK",
    "HEALTH_FILE",
    "RQVAE",
    "AlignedRQVAE",
    "AlignmentConfig",
    "CooccurrenceConfig",
    "DasConfig",
    "DistillConfig",
    "ItemRows",
    "LetterConfig",
    "MatchConfig",
    "Pass",
    "ProductConfig",
    "RQKmeansConfig",
    "RQVaeConfig",
    "RqDinoLoss",
    "SemanticTokenizer",
    "TokenizerConfig",
    "TokenizerMethod",
    "level_health",
    "map_blocks",
    "pad_rows",
    "reseeding",
    "rq_dino_loss",
    "tokenize",
    "train_autoencoder",
]
