"""A recipe: what to train, on what, how, and what to compare. YAML files map onto these classes one to one.

The frozen dataclasses define all keys. `--set train.learning_rate=1e-3` and the arms of a comparison use the same
dotted keys, and override values of the same mapping.
"""

from __future__ import annotations

import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from spannorm.errors import InputError, shown, unknown
from spannorm.kernels import KERNELS
from spannorm.model_keys import MODEL_KEYS, checked_key
from spannorm.train.optimizers import OPTIMIZERS
from spannorm.train.yaml_reader import read_yaml
from spannorm.values import checked, limited, limits_of

_SEED = (1 << 32) - 1  # the largest that NumPy and Transformers accept
_STEPS, _AT_ONCE = 10**8, 1 << 20
_LONGEST_NAME = 100


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
    """For text files: a string that ends a document, so that one file can hold several."""
    tokenizer: str = "bytes"
    """`bytes`; `bpe` (byte-level BPE trained on the training documents); or the folder or Hub name of any
    Hugging Face tokenizer."""
    vocab_size: int = limited(8192, least=258, most=1 << 20)
    """Vocabulary of a `bpe` tokenizer, with the end-of-document token. Other tokenizers have their own."""
    validation_fraction: float = limited(0.02, above=0, below=0.5)
    test_fraction: float = limited(0.02, above=0, below=0.5)


@dataclass(frozen=True)
class TrainRecipe:
    """One training run: AdamW or Muon, warm-up, then cosine or warm-up–stable–decay."""

    steps: int = limited(200, least=1, most=_STEPS)
    """Optimizer steps."""
    sequence_length: int = limited(128, least=2, most=1 << 24)
    batch_size: int = limited(4, least=1, most=_AT_ONCE)
    """Sequences per forward pass; an upper limit with several processes, because they share a step's sequences."""
    accumulation: int = limited(1, least=1, most=_AT_ONCE)
    """Forward passes per optimizer step. A step has batch_size · accumulation sequences, over all processes."""
    learning_rate: float = limited(6e-3, above=0, most=1e6)
    """Peak learning rate."""
    optimizer: str = limited("adamw", known=OPTIMIZERS)
    """`adamw`, or `muon`: Muon for the matrices inside blocks, AdamW for the rest, one learning rate for both."""
    schedule: str = limited("cosine", known=("cosine", "wsd", "ramp"))
    """`cosine`; `wsd`: constant after warm-up, then linear decay; or `ramp`: from 0 up to the peak at the last step. A
    ramp ends early if all that was learned is lost (`spannorm max-lr`)."""
    warmup_steps: int = limited(20, least=0, most=_STEPS)
    decay_fraction: float = limited(0.2, least=0, most=1)
    """`wsd` only: the share of the steps in which the rate decays."""
    final_learning_rate: float = limited(0.1, least=0, most=1)
    """The last learning rate as a share of the peak."""
    weight_decay: float = limited(0.1, least=0, most=1e6)
    """On matrices only, not on norms, biases, learned gains and embeddings."""
    adam_beta1: float = limited(0.9, least=0, below=1)
    adam_beta2: float = limited(0.95, least=0, below=1)
    adam_epsilon: float = limited(1e-8, above=0, most=1)
    clip_norm: float = limited(1.0, least=0, most=1e12)
    """Largest global gradient norm; 0 turns clipping off."""
    precision: str = limited("auto", known=("auto", "fp32", "bf16"))
    """`fp32`, `bf16` (autocast), or `auto`: bf16 on a GPU that supports it, fp32 otherwise."""
    kernels: str = limited("auto", known=KERNELS)
    """For add-and-norm: `reference`, `triton`, or `auto`: Triton's if it can run on the GPU (docs/performance.md)."""
    loss_chunk: int = limited(0, least=0, most=1 << 40)
    """Compute the loss in chunks of this many tokens. With a large vocabulary this saves memory; backward computes the
    head again. 0: all tokens of a pass at once."""
    parallel: str = limited("ddp", known=("ddp", "fsdp"))
    """How several processes share the work: `ddp` splits the batch; `fsdp` (FSDP2) also splits parameters, gradients
    and optimizer state (docs/processes.md)."""
    compile: bool = False
    activation_checkpointing: bool = False
    on_nan: str = limited("stop", known=("stop", "skip"))
    """After a step whose loss or gradient is not finite: `stop` ends the run as failed; `skip` keeps the weights from
    before the step and goes on (at most 8 in a row)."""
    on_spike: str = limited("keep", known=("keep", "rollback"))
    """After a step whose loss spikes: `keep` goes on; `rollback` returns to the last checkpoint before it, and leaves
    out the sequences in between (at most 3 times to one checkpoint)."""
    evaluation_sequences: int = limited(64, least=1, most=_AT_ONCE)
    """Sequences of the validation (and of the test) split that measure the final loss."""
    checkpoint_every: int = limited(100, least=1, most=_STEPS)
    """Optimizer steps between checkpoints. There is always one after the last step."""
    probe_every: int = limited(50, least=1, most=_STEPS)
    """Optimizer steps between records of signal and gradient by layer. The first and the last step always have one."""
    collapse: bool = False
    """After training, measure rank, spectrum and how much the loss increases if each block is skipped."""
    evaluate: tuple[str, ...] = ()
    """Tasks to run on the model after training: `local`, `paper`, or lm-eval's names (docs/eval.md)."""
    evaluate_questions: int = limited(200, least=0, most=_AT_ONCE)
    """Questions per task at most; 0 means all."""
    seed: int = limited(0, least=0, most=_SEED)
    """Seeds the weights and the order of the data. Arms with the same seed see the same tokens in the same order."""
    threads: int = limited(0, least=0, most=1024)
    """CPU threads of this run; 0 means PyTorch's choice."""


@dataclass(frozen=True)
class ProtocolRecipe:
    """How arms are compared on equal terms (docs/lab.md). Each arm has its own best learning rate, which is chosen on
    `train.seed` and the validation split, and then confirmed on fresh seeds and the test split."""

    seeds: tuple[int, ...] = limited((), least=0, most=_SEED)
    """Fresh seeds for the confirmation: three for a first look, five for a claim. None: only the grid is run."""
    extensions: int = limited(1, least=0, most=100)
    """How many learning rates may be added beyond each edge of the grid, for all arms, while an arm's best is there."""
    pairs: tuple[tuple[str, ...], ...] = ()
    """Pairs of arms to compare with each other, chosen beforehand. An arm is named as in the report: placement, depth
    rule, other overrides; or by the placement alone if only one arm has it."""


@dataclass(frozen=True)
class CompareRecipe:
    """What a comparison varies. Keys are the dotted keys of `--set`; any key of the recipe is allowed."""

    arms: tuple[Mapping[str, Any], ...] = ()
    """One mapping per arm: how it differs from the recipe. If a comparison has several tables, `table` names the arm's
    table. A run that is in two tables is run once."""
    grid: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Every arm is run with every combination of these values. A value may be a mapping of several keys; then its name
    here is free."""
    protocol: ProtocolRecipe = ProtocolRecipe()


@dataclass(frozen=True)
class LadderRecipe:
    """Sizes of one family of models. The number of tokens grows with the size (`spannorm ladder`, docs/ladder.md)."""

    sizes: tuple[int, ...] = ()
    """Parameters without embeddings, ascending. The last size is predicted from the others before it is run."""
    aspect: float = limited(4.0, above=0.0)
    """Width divided by number of blocks, as near as whole heads and blocks allow."""
    head_size: int = limited(16, least=2)
    tokens_per_parameter: float = limited(20.0, above=0.0)
    batch_exponent: float = limited(0.5, least=0.0, most=1.0)
    """`train.batch_size` is for the smallest size. For others it is multiplied by (their tokens ∕ its tokens) to this
    power."""
    warmup: float = limited(0.05, above=0.0, below=1.0)
    """The share of the steps."""
    rate_sizes: int = limited(2, least=1)
    """How many of the smallest sizes try every learning rate of `compare.grid`. For larger sizes the rate is scaled by
    1 ∕ width; the next size also tries half and twice of it."""
    seeded_sizes: int = limited(2, least=1)
    """How many of the largest sizes run on `compare.protocol.seeds`; the others on `train.seed` alone."""
    side: int = limited(1, least=0)
    """The size, counted from 0, for which `token_ratios` and `depths` are run."""
    token_ratios: tuple[float, ...] = ()
    """Other tokens per parameter."""
    depths: tuple[int, ...] = ()
    """Other numbers of blocks, the width chosen to keep the parameters."""


@dataclass(frozen=True)
class Recipe:
    """A whole recipe. `model` holds keys of `SpanNormConfig`; the sizes must be given (`spannorm.model_keys`)."""

    name: str = "run"
    model: Mapping[str, Any] = field(default_factory=dict)
    data: DataRecipe = DataRecipe()
    train: TrainRecipe = TrainRecipe()
    compare: CompareRecipe = CompareRecipe()
    ladder: LadderRecipe = LadderRecipe()

    def to_dict(self) -> dict[str, Any]:
        """A plain mapping, from which `recipe_from_dict` makes an equal recipe."""
        return asdict(self)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe from a YAML file and apply `key=value` overrides.

    Raises `InputError` for a missing file, broken YAML, an unknown key or a value of the wrong kind.
    """
    path = Path(path)
    try:
        found = path.is_file()
        text = path.read_text(encoding="utf-8") if found else ""
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error.reason}).") from None
    except OSError as error:
        raise InputError(f"cannot read {shown(str(path))}: {error.strerror or error}.") from None
    if not found:
        raise InputError(f"no recipe at {path}: give the path of a YAML file, such as recipes/demo.yaml.")
    raw = read_yaml(text, str(path))
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise InputError(f"{path} must hold a mapping with the keys {', '.join(_names(Recipe))}.")
    raw.setdefault("name", path.stem)
    return _overridden(raw, overrides)


def overridden(recipe: Recipe, overrides: Iterable[str]) -> Recipe:
    """A recipe with `key=value` overrides applied."""
    return _overridden(recipe.to_dict(), overrides)


def _overridden(raw: dict[str, Any], overrides: Iterable[str]) -> Recipe:
    for item in overrides:
        key, equals, value = item.partition("=")
        if not equals:
            raise InputError(f"--set takes key=value, such as train.steps=100; {shown(item)} has no '='.")
        set_key(raw, key.strip(), read_yaml(value, f"the value of --set {shown(item)}"))
    return recipe_from_dict(raw)


def recipe_from_dict(raw: Mapping[str, Any]) -> Recipe:
    """Build a recipe from a plain mapping, checking every key, kind and range."""
    recipe: Recipe = _build(Recipe, raw, "recipe")
    recipe = replace(recipe, model=_model(recipe.model))
    _check_name(recipe.name)
    _check_combinations(recipe.train)
    return recipe


def set_key(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key (`train.steps`, `compare.grid.train.seed`) in nested mappings, in place."""
    *parents, last = key.split(".")
    if key.startswith("compare.grid."):  # its keys contain dots
        parents, last = ["compare", "grid"], key.removeprefix("compare.grid.")
    for parent in parents:
        child = raw[parent] = {} if raw.get(parent) is None else raw[parent]
        if not isinstance(child, dict):
            raise InputError(f"cannot set {shown(key)}: {shown(parent)} is a value, not a section.")
        raw = child
    raw[last] = value


def _names(cls: type) -> list[str]:
    return [f.name for f in fields(cls)]


_kinds = cache(typing.get_type_hints)


def _build(cls: type, raw: Any, where: str) -> Any:
    if raw is None:
        raw = {}
    if not isinstance(raw, Mapping):
        raise InputError(f"{where} must be a mapping with the keys {', '.join(_names(cls))}; got {shown(raw)}.")
    kinds, declared = _kinds(cls), {f.name: f for f in fields(cls)}
    values = {}
    for key, value in raw.items():
        if key not in kinds:
            raise unknown(f"key in {where}", key, _names(cls))
        at = key if where == "recipe" else f"{where}.{key}"
        if is_dataclass(kinds[key]):
            values[key] = _build(kinds[key], value, at)
        else:
            values[key] = checked(kinds[key], value, at, limits_of(declared[key]))
    return cls(**values)


def _model(given: Mapping[str, Any]) -> dict[str, Any]:
    """The model section, each value as its kind and within its limits."""
    for key in given:
        if key not in MODEL_KEYS:
            raise unknown("key in model", key, MODEL_KEYS)
    return {key: checked_key(key, value, "model.{}") for key, value in given.items()}


def _check_name(name: str) -> None:
    if name in ("", ".", "..") or Path(name).name != name:  # a folder below runs/, and nowhere else
        raise InputError(f"name must be a plain folder name, neither a path nor '..'; got {shown(name)}.")
    if not name.isprintable() or len(name.encode()) > _LONGEST_NAME or name != name.strip() or name[0] == "-":
        raise InputError(
            f"name must be a folder name of at most {_LONGEST_NAME} bytes of printable characters, without a space at "
            f"an end and without a '-' in front; got {shown(name)}."
        )


def _check_combinations(t: TrainRecipe) -> None:
    """Settings that are valid alone and not together."""
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
