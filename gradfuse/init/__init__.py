"""Initialisation by what reads each weight, and an audit of the weights that are there."""

from gradfuse.init.audit import AuditFinding, AuditReport, audit_init
from gradfuse.init.gains import gain
from gradfuse.init.initialize import initialize_
from gradfuse.init.report import InitReport, InitRow

__all__ = [
    "AuditFinding",
    "AuditReport",
    "InitReport",
    "InitRow",
    "audit_init",
    "gain",
    "initialize_",
]
