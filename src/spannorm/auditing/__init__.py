"""The actual wiring and init of a model, found by running it: wiring, init, signal, a verdict. docs/audit.md."""

from spannorm.auditing.inspection import Audit, StackAudit, audit, audit_target
from spannorm.auditing.page import show
from spannorm.auditing.row import family_fields
from spannorm.auditing.targets import resolve

__all__ = ["Audit", "StackAudit", "audit", "audit_target", "family_fields", "resolve", "show"]
