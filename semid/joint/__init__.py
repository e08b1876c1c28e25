"""End-to-end training: memory bank, differentiable codes, the losses of the joint step, gradient surgery, stages."""

from semid.joint.bank import (
    Bank,
    BankHealth,
    Fresh,
    MemoryBank,
    bucket_sizes,
    encode_fresh,
    unique_rows,
)
from semid.joint.codes import (
    Relaxation,
    code_mixtures,
    level_logits,
)
from semid.joint.config import (
    JointConfig,
    Phase,
    Surgery,
)
from semid.joint.model import (
    TEACHER_TERMS,
    Content,
    JointModel,
    Objective,
    Reach,
    StepConfig,
)
from semid.joint.recipes import (
    RECIPES,
)
from semid.joint.stages import (
    Earlier,
    encode_items,
)
from semid.joint.surgery import (
    Projected,
    projected,
    sum_without_conflict,
)
from semid.joint.terms import (
    code_agreement,
    mutual_info_nce,
    session_contrast,
)
from semid.joint.training import (
    train_joint,
    trained_encoder,
)

__all__ = [
    "RECIPES",
    "TEACHER_TERMS",
    "Bank",
    "BankHealth",
    "Content",
    "Earlier",
    "Fresh",
    "JointConfig",
    "JointModel",
    "MemoryBank",
    "Objective",
    "Phase",
    "Projected",
    "Reach",
    "Relaxation",
    "StepConfig",
    "Surgery",
    "bucket_sizes",
    "code_agreement",
    "code_mixtures",
    "encode_fresh",
    "encode_items",
    "level_logits",
    "mutual_info_nce",
    "projected",
    "session_contrast",
    "sum_without_conflict",
    "train_joint",
    "trained_encoder",
    "unique_rows",
]
