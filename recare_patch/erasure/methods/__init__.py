"""Erasing methods: one file each; loops, checkpoints and costs are the run's."""

from recare_patch.erasure.methods.protocol import (
    ErasingContext,
    Instead,
    LossMethod,
    Method,
    Needs,
    Stages,
    load_method,
    method_names,
)

__all__ = [
    "ErasingContext",
    "Instead",
    "LossMethod",
    "Method",
    "Needs",
    "Stages",
    "load_method",
    "method_names",
]
