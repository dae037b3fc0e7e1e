"""Stands in for Transformers' export suite, which its source distribution leaves out: no test."""


class ExportTesterMixin:
    """Nothing; the common tests' base."""
