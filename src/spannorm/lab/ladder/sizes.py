"""The rungs of a ladder: a number of parameters becomes blocks, width, tokens, batch and steps, by stated rules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from spannorm.errors import InputError
from spannorm.train.needs import short
from spannorm.train.recipe import Recipe


@dataclass(frozen=True)
class Rung:
    """One size on one number of tokens."""

    kind: str
    """`size`, or of the side ladders `tokens` or `depth`."""
    blocks: int
    width: int
    heads: int
    ffn: int
    ratio: float
    """Tokens per parameter."""
    batch: int
    """Sequences of a batch."""
    steps: int
    accumulation: int
    """Batches of so many sequences a step."""
    sequence_length: int
    warmup: int

    @property
    def parameters(self) -> int:
        """Of the sublayers' matrices: `L·(4d² + 3·d·f)`. Norms, embedding and head are left out."""
        return self.blocks * block_parameters(self.width, self.ffn)

    @property
    def tokens(self) -> int:
        return self.steps * self.batch * self.accumulation * self.sequence_length

    @property
    def compute(self) -> float:
        """Operations of training, `6·N·D` (Kaplan et al. 2020): attention's own products and the head are left out."""
        return 6.0 * self.parameters * self.tokens

    @property
    def name(self) -> str:
        return f"{short(self.parameters)}, {self.blocks} × {self.width}, {self.ratio:g} tokens each"

    @property
    def overrides(self) -> Mapping[str, Any]:
        """By dotted key of a recipe."""
        return {
            "model.num_hidden_layers": self.blocks, "model.hidden_size": self.width,
            "model.intermediate_size": self.ffn, "model.num_attention_heads": self.heads,
            "train.batch_size": self.batch, "train.steps": self.steps, "train.warmup_steps": self.warmup,
        }  # fmt: skip


def ffn_size(width: int) -> int:
    """Of a gated feed-forward: 8∕3 of the width, up to a multiple of 8."""
    return 8 * math.ceil(width / 3)


def block_parameters(width: int, ffn: int) -> int:
    return 4 * width * width + 3 * width * ffn


def heads_of(width: int, head_size: int) -> int:
    """How many heads share a width evenly, each of an even size as near to `head_size` as can be."""
    shares = [n for n in range(1, width // 2 + 1) if width % (2 * n) == 0]
    return min(shares, key=lambda n: abs(math.log(width / n / head_size)))


def shape(parameters: float, aspect: float, head_size: int, blocks: int = 0) -> tuple[int, int]:
    """Blocks and width of a model of about so many parameters.

    Of all multiples of half a head the width whose width per block is nearest to `aspect` (on a log scale, parameters
    weighing four times as much). Where `blocks` is given, of all multiples of an eighth of a head the one whose
    parameters are nearest.
    """
    shapes: list[tuple[float, int, int]] = []
    step = max(2, 2 * (head_size // (16 if blocks else 4)))
    for width in range(step, step * (2 + math.ceil(2 * (parameters * aspect) ** (1 / 2) / step)), step):
        own = block_parameters(width, ffn_size(width))
        depth = blocks or max(1, round(parameters / own))
        off = abs(math.log(depth * own / parameters))
        shapes.append((4 * off + (0 if blocks else abs(math.log(width / (depth * aspect)))), depth, width))
    _, depth, width = min(shapes)
    return depth, width


def rungs(recipe: Recipe) -> list[Rung]:
    """Every rung of a recipe's ladder: the sizes in their order, then the side ladders.

    Raises:
        InputError: sizes that do not ascend or come to the same model, or too few of them.
    """
    ladder, t = recipe.ladder, recipe.train
    sizes = ladder.sizes
    _check_sizes(recipe)
    side = sizes[ladder.side]
    wanted = [("size", size, ladder.tokens_per_parameter, 0) for size in sizes]
    wanted += [("tokens", side, ratio, 0) for ratio in ladder.token_ratios]
    wanted += [("depth", side, ladder.tokens_per_parameter, depth) for depth in ladder.depths]
    rungs: list[Rung] = []
    first = 0.0
    for kind, size, ratio, depth in wanted:
        blocks, width = shape(size, ladder.aspect, ladder.head_size, depth)
        ffn = ffn_size(width)
        tokens = ratio * blocks * block_parameters(width, ffn)
        first = first or tokens
        batch = max(1, round(t.batch_size * (tokens / first) ** ladder.batch_exponent))
        steps = max(2, round(tokens / (batch * t.accumulation * t.sequence_length)))
        warmup = min(max(1, round(ladder.warmup * steps)), steps - 1)
        heads = heads_of(width, ladder.head_size)
        rung = Rung(kind, blocks, width, heads, ffn, ratio, batch, steps, t.accumulation, t.sequence_length, warmup)
        twin = next((r for r in rungs if r.overrides == rung.overrides), None)
        if twin is not None and kind == "size":
            raise InputError(
                f"ladder.sizes {short(size)} comes to the same model as the one before it, {twin.name}: choose sizes "
                "further apart, or a smaller ladder.head_size."
            )
        rungs += [] if twin is not None else [rung]
    return rungs


def _check_sizes(recipe: Recipe) -> None:
    """Refuse too few sizes, sizes that do not ascend, and a model whose sizes are given."""
    ladder, sizes = recipe.ladder, recipe.ladder.sizes
    if len(sizes) < 4:
        raise InputError(
            "ladder.sizes takes four sizes or more: three to fit a curve through, and the largest, which is predicted "
            f"from them; got {list(sizes)}."
        )
    if sorted(set(sizes)) != list(sizes) or sizes[0] < 1:
        raise InputError(f"ladder.sizes must ascend and be above 0; got {list(sizes)}.")
    for key, most in (("rate_sizes", len(sizes) - 2), ("seeded_sizes", len(sizes)), ("side", len(sizes) - 2)):
        if getattr(ladder, key) > most:
            raise InputError(
                f"ladder.{key} must be at most {most} with {len(sizes)} sizes; got {getattr(ladder, key)}."
            )
    for where, keys in (("the model section", set(recipe.model)), ("compare.arms", _of_arms(recipe, "model"))):
        if given := sorted(_SIZES & keys):
            raise InputError(f"a ladder chooses the model's sizes: take {', '.join(given)} out of {where}.")
        if given := sorted(_COUNTED_OTHERWISE & keys):
            raise InputError(
                f"a ladder counts dense blocks in which every head has its own keys and values: take "
                f"{', '.join(given)} out of {where}, or compare sizes with `spannorm compare`."
            )
    if given := sorted({"accumulation", "sequence_length"} & _of_arms(recipe, "train")):
        raise InputError(
            f"a ladder gives all arms the same tokens: take train.{', train.'.join(given)} out of compare.arms."
        )


_SIZES = {"num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"}
_COUNTED_OTHERWISE = {"num_key_value_heads", "head_dim", "num_experts"}


def _of_arms(recipe: Recipe, section: str) -> set[str]:
    """The keys of one section that arms set."""
    keys = {key.partition(".")[::2] for arm in recipe.compare.arms for key in arm}
    return {key for name, key in keys if name == section}
