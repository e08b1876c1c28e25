"""End-to-end mode: memory bank, differentiable codes, the losses of the joint step, gradient surgery."""

from semid.joint.bank import Bank, BankHealth, Fresh, MemoryBank, bucket_sizes, encode_fresh, unique_rows
from semid.joint.codes import Relaxation, code_mixtures, level_logits
from semid.joint.surgery import Projected, projected, sum_without_conflict
from semid.joint.terms import code_agreement, mutual_info_nce, session_contrast

__all__ = [
    "Bank",
    "BankHealth",
    "Fresh",
    "MemoryBank",
    "Projected",
    "Relaxation",
    "bucket_sizes",
    "code_agreement",
    "code_mixtures",
    "encode_fresh",
    "level_logits",
    "mutual_info_nce",
    "projected",
    "session_contrast",
    "sum_without_conflict",
    "unique_rows",
]
