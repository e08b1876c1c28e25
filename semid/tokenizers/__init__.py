"""Tokenizers: content vectors to semantic IDs."""

from semid.tokenizers.alignment import (
    AlignmentConfig,
    CooccurrenceConfig,
    DasConfig,
    DistillConfig,
    LetterConfig,
    PpmiConfig,
    Signal,
    VectorColumn,
)
from semid.tokenizers.rqvae import (
    BLOCK,
    RQVAE,
    AlignedRQVAE,
    ItemRows,
    Pass,
    RQVaeConfig,
    in_blocks,
    padded,
    reseeding,
    train_autoencoder,
)
from semid.tokenizers.tokenization import (
    tokenize,
)
from semid.tokenizers.tokenizer import (
    ProductConfig,
    RQKmeansConfig,
    SemanticTokenizer,
    TokenizerConfig,
)

__all__ = [
    "BLOCK",
    "RQVAE",
    "AlignedRQVAE",
    "AlignmentConfig",
    "CooccurrenceConfig",
    "DasConfig",
    "DistillConfig",
    "ItemRows",
    "LetterConfig",
    "Pass",
    "PpmiConfig",
    "ProductConfig",
    "RQKmeansConfig",
    "RQVaeConfig",
    "SemanticTokenizer",
    "Signal",
    "TokenizerConfig",
    "VectorColumn",
    "in_blocks",
    "padded",
    "reseeding",
    "tokenize",
    "train_autoencoder",
]
