"""Stands in for Transformers' generation suite, which its source distribution leaves out: no test."""


class GenerationTesterMixin:
    """Nothing; the common tests ask whether a generating model's suite inherits it."""
