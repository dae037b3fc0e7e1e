"""Text to token ids. Every tokenizer is a Hugging Face fast tokenizer, so that it can be saved with a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spannorm.errors import InputError
from spannorm.train.recipe import DataRecipe

BYTES_VOCABULARY = 257
END_OF_DOCUMENT = "<|endoftext|>"
"""The end-of-document token of the `bytes` and `bpe` tokenizers; their last id."""

_CHARACTERS = 1 << 21  # encoded at a time: an encoding takes some hundred bytes of memory per token
_PIECE = 1 << 20
_LONGEST = 1 << 25


def load_tokenizer(recipe: DataRecipe, training_documents: Callable[[], Iterator[str]]) -> PreTrainedTokenizerFast:
    """The tokenizer that `recipe.tokenizer` names.

    - `bytes`: the id of a token is the value of its byte; 256 ends a document.
    - `bpe`: byte-level BPE trained on `training_documents()`, with `recipe.vocab_size` tokens. It has fewer if no pair
      of tokens occurs twice any more.
    - any other: loaded from a local folder or the Hub, without running its code.

    Raises `InputError` if it cannot be loaded, is not a fast tokenizer, or has no end-of-sequence token.
    """
    if recipe.tokenizer == "bytes":
        return _wrap(models.BPE(vocab=_byte_ids(), merges=[]), use_regex=False)
    if recipe.tokenizer == "bpe":
        return _train_bpe(recipe.vocab_size, training_documents())
    try:
        tokenizer = AutoTokenizer.from_pretrained(recipe.tokenizer, trust_remote_code=False)
    except Exception as error:  # the parsers behind it raise nearly every kind
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"cannot load data.tokenizer {recipe.tokenizer!r} ({reason}). Known: bytes, bpe, or the folder "
            "or Hub name of a Hugging Face tokenizer that needs no code of its own."
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise InputError(
            f"data.tokenizer {recipe.tokenizer!r} is a {type(tokenizer).__name__}, not a fast tokenizer: "
            "choose one that has a tokenizer.json."
        )
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"data.tokenizer {recipe.tokenizer!r} has no end-of-sequence token to end a document with: "
            "set its eos_token and save it again, or choose another."
        )
    return tokenizer


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: Iterable[str]) -> Iterator[np.ndarray]:
    """Yield the token ids of each document, shape (tokens,), an unsigned integer dtype; no token is added.

    Text that spells a special token, such as `<|endoftext|>`, stays text.
    """
    if is_bytes(tokenizer):
        for text in documents:
            yield np.frombuffer(text.encode(), np.uint8)
        return
    # A copy, because a prompt typed by a user may well mean the special token.
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    splits = backend.pre_tokenizer
    by_words = backend.normalizer is None and isinstance(splits, pre_tokenizers.ByteLevel) and splits.use_regex

    def encoded(texts: list[str]) -> list[np.ndarray]:
        return [np.array(e.ids, np.uint32) for e in backend.encode_batch_fast(texts, add_special_tokens=False)]

    for batch in _batches(documents):
        *short, last = batch  # a long document ends its batch
        if len(last) <= _CHARACTERS:
            yield from encoded(batch)
            continue
        yield from encoded(short)
        if by_words and not splits.add_prefix_space:
            yield np.concatenate([encoded([piece])[0] for piece in _pieces(last)])
        elif len(last) <= _LONGEST:
            yield from encoded([last])
        else:
            raise InputError(
                f"a document holds {len(last):,} characters, and this tokenizer takes {_LONGEST:,} at once: set "
                "data.document_separator to the text that ends a document, or split the file."
            )


def _pieces(text: str) -> Iterator[str]:
    """A long text in pieces that give the same tokens, because byte-level BPE never joins text across a single space.

    A long piece without a single space, which real text does not have, is cut anywhere."""
    start = 0
    while len(text) - start > _PIECE:
        end = start + _PIECE
        cut = text.rfind(" ", start + 1, end)
        while cut > start and (text[cut - 1].isspace() or text[cut + 1].isspace()):
            cut = text.rfind(" ", start + 1, cut)
        cut = cut if cut > start else end
        yield text[start:cut]
        start = cut
    yield text[start:]


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= _CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _byte_ids() -> dict[str, int]:
    """Byte-level BPE's character for each byte: the byte's own if it is printable, otherwise one above 255."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printing = {ord(character) for character in alphabet if ord(character) < 256}
    others = iter(character for character in alphabet if ord(character) > 255)
    return {chr(byte) if byte in printing else next(others): byte for byte in range(256)}


def is_bytes(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether it is `bytes`: the id of a token is the value of its byte."""
    return len(tokenizer) == BYTES_VOCABULARY and tokenizer.get_vocab() == _byte_ids() | {END_OF_DOCUMENT: 256}


def _train_bpe(vocab_size: int, documents: Iterator[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,  # the end-of-document token comes last
        min_frequency=2,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator((piece for text in documents for piece in _pieces(text)), trainer)
    return _wrap(backend.model, use_regex=True)


def _wrap(model: models.BPE, use_regex: bool) -> PreTrainedTokenizerFast:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_DOCUMENT, special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_DOCUMENT,
        clean_up_tokenization_spaces=False,  # decoding returns the text as it was
        model_input_names=["input_ids", "attention_mask"],
    )
