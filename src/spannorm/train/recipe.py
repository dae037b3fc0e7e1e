"""A recipe: what to train, on what, how, and what to compare. YAML files map onto these classes one to one.

Frozen dataclasses are the truth; `--set train.learning_rate=1e-3` and the arms of a comparison are the same
dotted keys laid over the same mapping.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from spannorm.errors import InputError, unknown
from spannorm.kernels import KERNELS
from spannorm.train.optimizers import OPTIMIZERS


@dataclass(frozen=True)
class DataRecipe:
    """Where the text comes from and how it becomes tokens."""

    corpus: str = "stdlib"
    """`stdlib` (the running Python's own standard library); `packages` (151 MB of pinned packages' source, fetched
    once: docs/corpus.md); or a local folder or file: .txt, .py, .md and other text (a file is a document), .jsonl,
    .parquet."""
    text_field: str = "text"
    """The field that holds the text in JSONL and parquet."""
    document_separator: str | None = None
    """For text files: a string that ends a document, so that one file can hold many."""
    tokenizer: str = "bytes"
    """`bytes`; `bpe` (byte-level BPE trained on the training documents); or the folder or Hub name of any
    Hugging Face tokenizer."""
    vocab_size: int = 8192
    """Vocabulary of a `bpe` tokenizer, end-of-document token included. Other tokenizers bring their own."""
    validation_fraction: float = 0.02
    test_fraction: float = 0.02


@dataclass(frozen=True)
class TrainRecipe:
    """One training run: AdamW or Muon, warm-up, then cosine or warm-up–stable–decay."""

    steps: int = 200
    """Optimizer steps."""
    sequence_length: int = 128
    batch_size: int = 4
    """Sequences per forward pass; at most, where several processes share a step's."""
    accumulation: int = 1
    """Forward passes per optimizer step. A step sees batch_size · accumulation sequences, however many processes."""
    learning_rate: float = 6e-3
    """Peak learning rate."""
    optimizer: str = "adamw"
    """`adamw`, or `muon`: Muon for the matrices inside blocks, AdamW for the rest, one learning rate for both."""
    schedule: str = "cosine"
    """`cosine`; `wsd`: constant after warm-up, then linear decay; or `ramp`: from 0 up to the peak at the last step,
    ended early once everything learned is lost (`spannorm max-lr`)."""
    warmup_steps: int = 20
    decay_fraction: float = 0.2
    """`wsd` only: the share of the steps spent decaying."""
    final_learning_rate: float = 0.1
    """The last learning rate as a share of the peak."""
    weight_decay: float = 0.1
    """On matrices; never on norms, biases, learned gains and embeddings."""
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-8
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    precision: str = "auto"
    """`fp32`, `bf16` (autocast), or `auto`: bf16 on a GPU that has it, fp32 otherwise."""
    kernels: str = "auto"
    """Of add-and-norm: `reference`, `triton`, or `auto`: Triton's on a GPU that has it (docs/performance.md)."""
    loss_chunk: int = 0
    """Tokens whose logits are held at once, for a large vocabulary: less memory, and the head once more in backward.
    0: all of a pass's."""
    parallel: str = "ddp"
    """What several processes share: `ddp` the batch alone, `fsdp` (FSDP2) parameters, gradients and optimizer state
    too (docs/processes.md)."""
    compile: bool = False
    activation_checkpointing: bool = False
    on_nan: str = "stop"
    """A step whose loss or gradient is not finite: `stop` ends the run as failed, `skip` leaves the weights as they
    were and goes on (at most 8 in a row)."""
    on_spike: str = "keep"
    """A step whose loss spikes: `keep` it, or `rollback` to the last checkpoint before it and go on without the
    sequences in between (at most 3 times to one checkpoint)."""
    evaluation_sequences: int = 64
    """Sequences of the validation (and of the test) split that measure the final loss."""
    checkpoint_every: int = 100
    """Optimizer steps between checkpoints; the last step is always one."""
    probe_every: int = 50
    """Optimizer steps between records of signal and gradient by layer; the first and last are always made."""
    collapse: bool = False
    """After training, measure rank, spectrum and what the loss loses by each block when it is skipped."""
    evaluate: tuple[str, ...] = ()
    """After training, tasks to run on the model: `local`, `paper`, or lm-eval's names (docs/eval.md)."""
    evaluate_questions: int = 200
    """Of each of these tasks at most; 0 takes all."""
    seed: int = 0
    """Draws the weights and the order of the data. Arms of one seed see the same tokens in the same order."""
    threads: int = 0
    """CPU threads of this run; 0 leaves PyTorch's choice."""


@dataclass(frozen=True)
class ProtocolRecipe:
    """How arms meet on equal terms (docs/lab.md): each at its own best learning rate, chosen on `train.seed` and the
    validation split, confirmed on fresh seeds and the test split."""

    seeds: tuple[int, ...] = ()
    """Fresh seeds for the confirmation: three for a look, five for a claim. None: the grid is run as it is written."""
    extensions: int = 1
    """How many learning rates the grid may grow by beyond each edge, for every arm, while one has its best there."""
    pairs: tuple[tuple[str, ...], ...] = ()
    """The arms to hold against each other, two and two, named beforehand as the report names them: placement, depth
    rule, other overrides; or by the placement alone where one arm has it."""


@dataclass(frozen=True)
class CompareRecipe:
    """What a comparison varies. Keys are the dotted keys of `--set`; any key of the recipe will do."""

    arms: tuple[Mapping[str, Any], ...] = ()
    """One mapping per arm: how it differs from the recipe, and under `table` the name of the table it stands in, where
    a comparison has several. A run that stands in two is run once."""
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Every arm is run with every combination of these values. A value may be a mapping of several keys; the name it
    stands under is then free."""
    protocol: ProtocolRecipe = ProtocolRecipe()


@dataclass(frozen=True)
class Recipe:
    """A whole recipe. `model` holds the keys of `SpanNormConfig` (all but `vocab_size` may be left out)."""

    name: str = "run"
    model: Mapping[str, Any] = field(default_factory=dict)
    data: DataRecipe = DataRecipe()
    train: TrainRecipe = TrainRecipe()
    compare: CompareRecipe = CompareRecipe()

    def to_dict(self) -> dict[str, Any]:
        """A plain mapping that `recipe_from_dict` turns back into an equal recipe."""
        return asdict(self)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe from a YAML file and lay `key=value` overrides over it.

    Raises `InputError` on a missing file, broken YAML, an unknown key or a value of the wrong kind.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"no recipe at {path}: give the path of a YAML file, such as recipes/demo.yaml.")
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not readable as YAML: {error}") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path} must hold a mapping with the keys {', '.join(_names(Recipe))}.")
    raw.setdefault("name", path.stem)
    return _overridden(raw, overrides)


def overridden(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    """A recipe with `key=value` overrides laid over it."""
    return _overridden(recipe.to_dict(), overrides)


def _overridden(raw: dict[str, Any], overrides: Iterable[str]) -> Recipe:
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals:
            raise InputError(f"--set takes key=value, such as train.steps=100; {item!r} has no '='.")
        try:
            set_key(raw, key.strip(), yaml.safe_load(value))
        except yaml.YAMLError as error:
            words = " ".join(str(error).split())
            raise InputError(f"--set {item!r}: the value is not readable as YAML ({words}).") from None
    return recipe_from_dict(raw)


def recipe_from_dict(raw: Mapping[str, Any]) -> Recipe:
    """Build a recipe from a plain mapping, checking every key, kind and range."""
    recipe: Recipe = _build(Recipe, raw, "recipe")
    _check_ranges(recipe)
    return recipe


def set_key(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key (`train.steps`, `compare.grid.train.seed`) in nested mappings, in place."""
    *parents, last = key.split(".")
    if key.startswith("compare.grid."):  # its keys are dotted themselves
        parents, last = ["compare", "grid"], key.removeprefix("compare.grid.")
    for parent in parents:
        child = raw.setdefault(parent, {})
        if not isinstance(child, dict):
            raise InputError(f"cannot set {key!r}: {parent!r} is a value, not a section.")
        raw = child
    raw[last] = value


def _names(cls: type) -> list[str]:
    return [f.name for f in fields(cls)]


def _build(cls: type, raw: Any, where: str) -> Any:
    if raw is None:
        raw = {}
    if not isinstance(raw, Mapping):
        raise InputError(f"{where} must be a mapping with the keys {', '.join(_names(cls))}; got {raw!r}.")
    kinds = typing.get_type_hints(cls)
    values = {}
    for key, value in raw.items():
        if key not in kinds:
            raise unknown(f"key in {where}", key, _names(cls))
        at = key if where == "recipe" else f"{where}.{key}"
        values[key] = _build(kinds[key], value, at) if is_dataclass(kinds[key]) else _cast(kinds[key], value, at)
    return cls(**values)


def _cast(kind: Any, value: Any, where: str) -> Any:
    """The value as the kind the field asks for, or an error that says what it asks for."""
    wrong = InputError(f"{where} must be {_words(kind)}; got {value!r}.")
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = next(k for k in typing.get_args(kind) if k is not type(None))
    origin = typing.get_origin(kind)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise wrong
        return tuple(_cast(typing.get_args(kind)[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise wrong
        return {str(k): _cast(typing.get_args(kind)[1], v, f"{where}.{k}") for k, v in value.items()}
    if kind is Any:
        return number_or_text(value)
    if kind is float and not isinstance(value, bool):
        value = number_or_text(value)
        if isinstance(value, int | float):
            return float(value)
    elif kind is bool or isinstance(value, bool):
        if kind is bool and isinstance(value, bool):
            return value
    elif isinstance(value, kind):
        return value
    raise wrong


def number_or_text(value: Any) -> Any:
    """YAML 1.1 reads `6e-3` as text; a recipe means the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _words(kind: Any) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(_words(k) for k in typing.get_args(kind))
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}
    origin = typing.get_origin(kind)
    if origin is not None:
        return "a list" if origin is tuple else "a mapping"
    return names.get(kind, str(kind))


def _check_ranges(recipe: Recipe) -> None:
    t, d = recipe.train, recipe.data
    if recipe.name in ("", "..") or Path(recipe.name).name != recipe.name:  # a folder below runs/, and nowhere else
        raise InputError(f"name must be a plain folder name, neither a path nor '..'; got {recipe.name!r}.")
    positive = ["steps", "batch_size", "accumulation", "learning_rate", "evaluation_sequences"]
    positive += ["checkpoint_every", "probe_every", "adam_epsilon"]
    not_negative = ["warmup_steps", "weight_decay", "clip_norm", "loss_chunk", "threads", "seed"]
    not_negative += ["evaluate_questions"]
    for name in positive:
        if not getattr(t, name) > 0:
            raise InputError(f"train.{name} must be above 0; got {getattr(t, name)}.")
    for name in not_negative:
        if not getattr(t, name) >= 0:
            raise InputError(f"train.{name} must not be negative; got {getattr(t, name)}.")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(t, name) < 1:
            raise InputError(f"train.{name} must lie in [0, 1); got {getattr(t, name)}.")
    for name in ("decay_fraction", "final_learning_rate"):
        if not 0 <= getattr(t, name) <= 1:
            raise InputError(f"train.{name} must lie in [0, 1]; got {getattr(t, name)}.")
    if t.sequence_length < 2:
        raise InputError(f"train.sequence_length must be at least 2; got {t.sequence_length}.")
    if t.warmup_steps >= t.steps:
        raise InputError(
            f"train.warmup_steps ({t.warmup_steps}) must be below train.steps ({t.steps}): try {t.steps // 10}."
        )
    if t.optimizer == "muon" and t.parallel == "fsdp":
        raise InputError(
            "train.optimizer muon needs whole matrices, which train.parallel fsdp shards: use adamw or ddp."
        )
    if t.evaluate and t.parallel == "fsdp":
        raise InputError(
            "train.evaluate needs the whole model on one process, which train.parallel fsdp shards: leave it out, and "
            "run `spannorm eval` on the finished run."
        )
    if t.schedule == "ramp" and t.on_spike == "rollback":
        raise InputError(
            "train.schedule ramp looks for the rate at which training breaks: leave train.on_spike at keep."
        )
    for name, value, known in [
        ("train.optimizer", t.optimizer, OPTIMIZERS),
        ("train.schedule", t.schedule, ("cosine", "wsd", "ramp")),
        ("train.precision", t.precision, ("auto", "fp32", "bf16")),
        ("train.kernels", t.kernels, KERNELS),
        ("train.parallel", t.parallel, ("ddp", "fsdp")),
        ("train.on_nan", t.on_nan, ("stop", "skip")),
        ("train.on_spike", t.on_spike, ("keep", "rollback")),
    ]:
        if value not in known:
            raise unknown(name, value, known)
    if recipe.compare.protocol.extensions < 0:
        raise InputError(f"compare.protocol.extensions must not be negative; got {recipe.compare.protocol.extensions}.")
    for name in ("validation_fraction", "test_fraction"):
        if not 0 < getattr(d, name) < 0.5:
            raise InputError(f"data.{name} must lie between 0 and 0.5; got {getattr(d, name)}.")
    if d.vocab_size < 258:
        raise InputError(
            f"data.vocab_size must be at least 258 (256 bytes, the end-of-document token and one merge); "
            f"got {d.vocab_size}."
        )
