"""End-to-end training: memory bank, differentiable codes, the losses of the joint step, gradient surgery, stages."""

from semid.joint.bank import Bank, BankHealth, Fresh, MemoryBank, bucket_sizes, encode_fresh, unique_rows
from semid.joint.codes import Relaxation, code_mixtures, level_logits
from semid.joint.config import CodeSchedule, HoldThenRefit, JointConfig, Phase, Refresh, Surgery
from semid.joint.context import PreviousRun, encode_items
from semid.joint.model import TEACHER_TERMS, JointModel, Objective, Reach, StepConfig
from semid.joint.programs import joint_program
from semid.joint.surgery import Projected, projected, sum_without_conflict
from semid.joint.terms import code_agreement, session_contrast, symmetric_info_nce
from semid.joint.training import train_end_to_end, trained_encoder

__all__ = [
    "TEACHER_TERMS",
    "Bank",
    "BankHealth",
    "CodeSchedule",
    "Fresh",
    "HoldThenRefit",
    "JointConfig",
    "JointModel",
    "MemoryBank",
    "Objective",
    "Phase",
    "PreviousRun",
    "Projected",
    "Reach",
    "Refresh",
    "Relaxation",
    "StepConfig",
    "Surgery",
    "bucket_sizes",
    "code_agreement",
    "code_mixtures",
    "encode_fresh",
    "encode_items",
    "joint_program",
    "level_logits",
    "projected",
    "session_contrast",
    "sum_without_conflict",
    "symmetric_info_nce",
    "train_end_to_end",
    "trained_encoder",
    "unique_rows",
]
