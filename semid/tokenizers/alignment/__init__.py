"""Alignments: collaborative losses that are added to the tokenizer's reconstruction, one file each."""

from semid.tokenizers.alignment.base import Alignment, AlignmentConfig, Signals
from semid.tokenizers.alignment.cooccurrence import CooccurrenceConfig
from semid.tokenizers.alignment.das import DasConfig
from semid.tokenizers.alignment.distill import DistillConfig
from semid.tokenizers.alignment.letter import LetterConfig
from semid.tokenizers.alignment.match import MatchConfig
from semid.tokenizers.alignment.signals import read_signals

__all__ = [
    "Alignment",
    "AlignmentConfig",
    "CooccurrenceConfig",
    "DasConfig",
    "DistillConfig",
    "LetterConfig",
    "MatchConfig",
    "Signals",
    "read_signals",
]
