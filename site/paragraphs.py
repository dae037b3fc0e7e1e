"""A griffe extension: in a docstring, a line such as `Equation: …` begins a paragraph of its own in the reference."""

from __future__ import annotations

import re
from typing import Any

import griffe

from spannorm.catalog import FIELDS

FIELD = re.compile(rf"^({'|'.join(FIELDS)}): ", re.MULTILINE)


class Paragraphs(griffe.Extension):
    """Puts an empty line before each field of a placement's docstring, and its name in bold."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called by griffe for every object that it has read."""
        if obj.docstring is not None:
            obj.docstring.value = FIELD.sub(r"\n**\1.** ", obj.docstring.value)
