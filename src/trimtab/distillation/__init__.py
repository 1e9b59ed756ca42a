"""Moving a task from one model to another."""

from trimtab.distillation.config import TransferConfig
from trimtab.distillation.pipeline import TransferResult, transfer

__all__ = ["TransferConfig", "TransferResult", "transfer"]
