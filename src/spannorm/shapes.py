"""Names for tensor shapes in signatures. They are checked at run time only under pytest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    Stream = Tensor
    State = Tensor
else:
    try:
        from jaxtyping import Float

        Stream = Float[Tensor, "batch seq *streams hidden"]
        State = Float[Tensor, "batch seq *opened hidden"]  # where streams are opened or closed on the way
    except ImportError:  # needed to check shapes, not to run
        Stream = State = Tensor
