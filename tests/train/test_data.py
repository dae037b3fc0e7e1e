"""Text to tokens to sequences: what is kept, where it goes, and what happens when something is wrong."""

import errno
import json
import os
import pickle
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter
from hashlib import sha256
from math import log
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from spannorm.errors import InputError
from spannorm.folders import partial_folder, sweep_partial
from spannorm.train import corpus
from spannorm.train import data as data_module
from spannorm.train.corpus import documents
from spannorm.train.data import SPLITS, TokenData, prepare_data
from spannorm.train.recipe import DataRecipe
from spannorm.train.sequences import TrainingSequences, evaluation_sequences
from spannorm.train.tokenizer import encode_documents, load_tokenizer

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=80)
TEXTS = ("the norm", "norm of last", "of of")
WORDS = "the norm of a block of the residual stream is the norm of a sum <|endoftext|> é 好"


def text_of(number: int) -> str:
    """A document unlike any other, some hundred characters long."""
    draw = np.random.default_rng(number)
    return f"{number}: " + " ".join(draw.choice(WORDS.split(), 20 + int(draw.integers(40))))


def write_corpus(folder: Path, texts: list[str]) -> DataRecipe:
    folder.mkdir(parents=True)
    for number, text in enumerate(texts):
        (folder / f"{number:04}.txt").write_text(text, encoding="utf-8", newline="")
    return DataRecipe(corpus=str(folder), validation_fraction=0.1, test_fraction=0.1)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    folder = tmp_path_factory.mktemp("small")
    return prepare_data(write_corpus(folder / "text", [text_of(i) for i in range(120)]), folder / "data")


def split_documents(data: TokenData, split: str) -> list[str]:
    """The texts of a split, cut out of its token file by hand. Bytes only."""
    tokens = data.tokens(split).tolist()
    texts, document = [], bytearray()
    for token in tokens:
        if token == 256:
            texts.append(document.decode())
            document = bytearray()
        else:
            document.append(token)
    assert not document, "a split ends with the end of a document"
    return texts


# Corpus


def test_standard_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = prepare_data(DataRecipe(), tmp_path / "data")
    texts = {split: split_documents(data, split) for split in SPLITS}
    everything = {text for split in SPLITS for text in texts[split]}
    assert Path(json.__file__).read_text(encoding="utf-8") in everything
    assert any(text.startswith("#\n# cp932.py") for text in everything)
    assert not any("Python Character Mapping Codec cp437" in text for text in everything)
    assert 8e6 < sum(split.bytes for split in data.splits.values()) < 16e6
    for name, split in data.splits.items():
        assert split.tokens == split.bytes + split.documents == len(data.tokens(name))
        assert split.documents == len(texts[name])
    assert data.vocab_size == 257 and data.end_of_document == 256 and data.dtype == "uint16"
    assert 3.0 < data.unigram_loss() < 4.0  # nats per byte of source code; a uniform guess costs 5.5

    monkeypatch.setattr(data_module, "documents", lambda recipe: pytest.fail("equal data is not made again"))
    assert prepare_data(DataRecipe(), tmp_path / "data") == data


@settings(max_examples=60, deadline=None)
@given(
    text=st.text("ab|\n", max_size=40),
    separator=st.sampled_from(["|", "||", "\n\n", "|a|"]),
    chunk=st.integers(1, 7),
)
def test_separator_does_not_depend_on_how_the_file_is_read(text: str, separator: str, chunk: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_CHARACTERS", chunk)
        path = Path(folder, "all.txt")
        path.write_text(text, newline="")
        found = list(documents(DataRecipe(corpus=str(path), document_separator=separator)))
    assert found == [part for part in text.split(separator) if part.strip()]


def test_every_format_gives_the_same_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text_of(i) + "\nline separator: \u2028 and \U0001f600" for i in range(12)]
    (tmp_path / "a.jsonl").write_text(
        "\n\n".join(json.dumps({"id": i, "body": text}) for i, text in enumerate(["", *texts, None])), "utf-8"
    )
    monkeypatch.setattr(corpus, "_ROWS", 5)
    table = pa.table({"id": range(14), "body": ["  ", *texts, None]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4)
    (tmp_path / "a.txt").write_text("\ufeff" + "<END>".join([*texts, " \n"]).replace("\n", "\r\n"), newline="")
    for name in ("a.jsonl", "a.parquet", "a.txt"):
        recipe = DataRecipe(corpus=str(tmp_path / name), text_field="body", document_separator="<END>")
        assert list(documents(recipe)) == texts, name


def test_folder_is_read_in_sorted_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.md", "a/z.TXT", "a/c/x.py", ".git/x.txt", "a/.x.txt", "a/image.png", "c.rst"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(documents(DataRecipe(corpus=str(tmp_path)))) == ["a/c/x.py", "a/z.TXT", "b.md", "c.rst"]


GOOD = '{"text": "good"}\n'


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (None, b"", ["no corpus at", "missing", "stdlib"]),
        ("c/a.png", b"x", ["holds no file that", "(of 1)", ".txt", ".parquet"]),
        ("c/a.txt", b"caf\xe9", ["a.txt is not UTF-8", "convert"]),
        ("c/a.jsonl", b'{"text": "caf\xe9"}', ["a.jsonl is not UTF-8"]),
        ("c/a.jsonl", GOOD.encode() + b"{oops\n", ["a.jsonl:2 is not JSON"]),
        ("c/a.jsonl", b"[1]\n", ["a.jsonl:1 is not a JSON object"]),
        ("c/a.jsonl", GOOD.encode() + b'{"id": 1, "body": ""}', ["a.jsonl:2", "'text'", "id, body", "data.text_field"]),
        ("c/a.jsonl", b'{"text": 3}', ["a.jsonl:1", "must be text", "int"]),
        ("c/a.jsonl", b'{"text": "\\ud83d"}', ["a.jsonl:1", "surrogate"]),
        ("c/a.parquet", b"PAR1 no", ["a.parquet is not readable as parquet"]),
        ("c/a.parquet", {"body": ["x"], "id": [1]}, ["a.parquet", "'text'", "body, id", "data.text_field"]),
        ("c/a.parquet", {"text": [1]}, ["a.parquet", "must be text", "int64"]),
        ("c/a.txt", b"only one", ["1 distinct documents", "data.document_separator"]),
    ],
)  # fmt: skip
def test_bad_corpus(tmp_path: Path, name: str | None, content: bytes | dict, words: list[str]) -> None:
    recipe = DataRecipe(corpus=str(tmp_path / "missing"))
    if name:
        (tmp_path / name).parent.mkdir()
        recipe = DataRecipe(corpus=str(tmp_path / "c"))
        if isinstance(content, dict):
            pq.write_table(pa.table(content), tmp_path / name)
        else:
            (tmp_path / name).write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError) as caught:
        prepare_data(recipe, tmp_path / "data")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install spannorm\[parquet\]"):
        list(documents(DataRecipe(corpus=str(tmp_path))))


# Tokenizers


def no_documents() -> list[str]:
    return []


BYTES = load_tokenizer(DataRecipe(), no_documents)
BPE = load_tokenizer(DataRecipe(tokenizer="bpe", vocab_size=290), lambda: iter([text_of(i) for i in range(60)]))


@settings(deadline=None)
@given(TEXT)
def test_bytes_are_bytes(text: str) -> None:
    (fast,) = encode_documents(BYTES, [text])
    assert fast.tolist() == list(text.encode())
    assert fast.tolist() == BYTES.encode(text, split_special_tokens=True, add_special_tokens=False)
    assert BYTES.decode(fast.tolist()) == text


@settings(deadline=None)
@given(st.lists(TEXT, max_size=5))
def test_bpe_returns_the_text(texts: list[str]) -> None:
    assert [BPE.decode(ids.tolist()) for ids in encode_documents(BPE, texts)] == texts


def test_bpe_learns_and_has_the_size_asked_for() -> None:
    assert len(BPE) == 290 and BPE.eos_token == "<|endoftext|>" and BPE.eos_token_id == 289
    (ids,) = encode_documents(BPE, [text_of(7)])
    assert len(ids) < len(text_of(7).encode()) / 2


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_end_token_spelled_in_a_text_is_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    text = "a<|endoftext|>b"
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        (ids,) = encode_documents(one, [text])
        assert one.eos_token_id not in ids and one.decode(ids.tolist()) == text
        # A prompt may mean it, and encoding documents has not changed that.
        assert one.eos_token_id in one.encode(text)


def test_documents_of_one_batch_and_of_many_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text_of(i) for i in range(9)]
    whole = [ids.tolist() for ids in encode_documents(BPE, texts)]
    monkeypatch.setattr("spannorm.train.tokenizer._CHARACTERS", 300)
    assert [ids.tolist() for ids in encode_documents(BPE, texts)] == whole
    assert whole[3] == BPE.encode(texts[3], split_special_tokens=True)


def word_tokenizer(folder: Path, size: int, **special: str) -> str:
    vocab = {word: i for i, word in enumerate(dict.fromkeys([*WORDS.split(), "?", "END"]))} | {"last": size - 1}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", **special).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(("size", "dtype"), [(65_536, "uint16"), (65_537, "uint32")])
def test_any_hugging_face_tokenizer(tmp_path: Path, size: int, dtype: str) -> None:
    recipe = write_corpus(tmp_path / "text", list(TEXTS))
    name = word_tokenizer(tmp_path / "words", size, eos_token="END")
    data = prepare_data(DataRecipe(corpus=recipe.corpus, tokenizer=name), tmp_path / "data")
    assert data.dtype == dtype and data.vocab_size == size
    vocab = data.tokenizer().get_vocab()
    expected = {(*(vocab[word] for word in text.split()), vocab["END"]) for text in TEXTS}
    assert {tuple(data.tokens(split).tolist()) for split in SPLITS} == expected
    stored = (tmp_path / "data" / "train.bin").read_bytes()
    width = {"uint16": 2, "uint32": 4}[dtype]
    assert int.from_bytes(stored[-width:], "little") == data.end_of_document == vocab["END"]


def test_tokenizers_that_cannot_serve(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="end-of-sequence"):
        load_tokenizer(DataRecipe(tokenizer=word_tokenizer(tmp_path / "words", 99)), no_documents)
    (tmp_path / "empty").mkdir()
    for name in (tmp_path / "empty", tmp_path / "not there"):
        with pytest.raises(InputError, match=r"cannot load data\.tokenizer .*Known: bytes, bpe"):
            load_tokenizer(DataRecipe(tokenizer=str(name)), no_documents)


# Preparation


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(TEXT.filter(lambda t: t.strip() and "\r" not in t and t[0] != "\ufeff"), min_size=1, max_size=25),
    validation=st.floats(0.01, 0.49),
    test=st.floats(0.01, 0.49),
)  # fmt: skip
def test_split_follows_the_hash_of_the_text(texts: list[str], validation: float, test: float) -> None:
    order = sorted(set(texts), key=lambda text: sha256(text.encode()).hexdigest())
    total = sum(len(text.encode()) for text in order)
    expected: dict[str, list[str]] = {"validation": [], "test": [], "train": []}
    for i, text in enumerate(order):
        held = {name: sum(len(t.encode()) for t in expected[name]) for name in expected}
        after = len(order) - i
        if held["validation"] < validation * total and not expected["test"] and after > 2:
            expected["validation"].append(text)
        elif held["test"] < test * total and after > 1 and not expected["train"]:
            expected["test"].append(text)
        else:
            expected["train"].append(text)
    with tempfile.TemporaryDirectory() as folder:
        recipe = write_corpus(Path(folder, "text"), texts)
        recipe = DataRecipe(corpus=recipe.corpus, validation_fraction=validation, test_fraction=test)
        if len(order) < 3:
            with pytest.raises(InputError, match="distinct documents"):
                prepare_data(recipe, Path(folder, "data"))
            return
        data = prepare_data(recipe, Path(folder, "data"))
        for split in SPLITS:
            in_corpus_order = sorted(expected[split], key=texts.index)
            assert split_documents(data, split) == in_corpus_order
            assert data.splits[split].bytes == sum(len(text.encode()) for text in in_corpus_order)
        assert data.duplicates == len(texts) - len(order)


def test_split_does_not_depend_on_file_names(small: TokenData, tmp_path: Path) -> None:
    recipe = write_corpus(tmp_path / "text", [text_of(i) for i in reversed(range(120))])
    other = prepare_data(recipe, tmp_path / "data")
    for split in SPLITS:
        assert set(split_documents(other, split)) == set(split_documents(small, split))
        assert small.splits[split].documents > 5
    assert other.corpus_sha256 == small.corpus_sha256
    assert other.sha256 != small.sha256, "the order of the tokens differs, and the hash says so"


def test_description_agrees_with_the_files(small: TokenData) -> None:
    for name, split in small.splits.items():
        content = (small.directory / f"{name}.bin").read_bytes()
        assert split.sha256 == sha256(content).hexdigest()
        assert small.tokens(name).tolist() == np.frombuffer(content, "<u2").tolist()
        assert not small.tokens(name).flags.writeable
        assert small.bytes_per_token(name) == split.bytes / split.tokens
    assert TokenData.open(small.directory) == small
    assert small.tokenizer().decode(small.tokens("test")[:-1].tolist()).startswith(split_documents(small, "test")[0])
    with pytest.raises(InputError, match="did you mean 'validation'"):
        small.tokens("valid")


def test_unigram_loss(small: TokenData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "_TOKENS", 100)
    seen = Counter(small.tokens("train").tolist())
    total = seen.total() + 257
    for split in ("validation", "test"):
        losses = [-log((seen[token] + 1) / total) for token in small.tokens(split).tolist()]
        assert small.unigram_loss(split) == pytest.approx(sum(losses) / len(losses), rel=1e-12)


def test_other_recipe_or_other_files_in_the_way(small: TokenData, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        prepare_data(DataRecipe(**{**vars(small.recipe), "tokenizer": "bpe", "vocab_size": 300}), small.directory)
    message = str(caught.value)
    assert "data.tokenizer ('bytes' there, 'bpe' given)" in message and "data.vocab_size" in message
    assert "data.corpus" not in message
    (tmp_path / "precious.txt").write_text("mine")
    for place in (tmp_path, tmp_path / "precious.txt"):
        with pytest.raises(InputError, match="something else"):
            prepare_data(small.recipe, place)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_corpus_that_changes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_corpus(tmp_path / "text", [text_of(i) for i in range(9)])

    def change(*args: object) -> PreTrainedTokenizerFast:
        (tmp_path / "text" / "0004.txt").write_text("changed between the passes")
        return BYTES

    monkeypatch.setattr(data_module, "load_tokenizer", change)
    with pytest.raises(InputError, match="changed while it was being read"):
        prepare_data(recipe, tmp_path / "data")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_damaged_data(small: TokenData, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no prepared data"):
        TokenData.open(tmp_path / "data")
    data = prepare_data(small.recipe, tmp_path / "data")
    size = 2 * data.splits["test"].tokens
    os.truncate(data.directory / "test.bin", size - 30)
    with pytest.raises(InputError, match=rf"test\.bin is truncated by 30 bytes.*{size}; delete the folder"):
        TokenData.open(data.directory)
    (data.directory / "test.bin").unlink()
    with pytest.raises(InputError, match=rf"truncated by {size} bytes"):
        TokenData.open(data.directory)
    for broken in ("", "[]", "{}", '{"splits": 3}'):
        (data.directory / "data.json").write_text(broken)
        with pytest.raises(InputError, match=r"data\.json is not readable.*delete the folder"):
            prepare_data(small.recipe, data.directory)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    recipe = write_corpus(tmp_path / "text", [text_of(i) for i in range(9)])

    def fail(*args: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    # A full disk may show only when the files are forced out to it; a folder refuses at once.
    monkeypatch.setattr(*((os, "fsync") if number == errno.ENOSPC else (Path, "mkdir")), fail)
    with pytest.raises(InputError) as caught:
        prepare_data(recipe, tmp_path / "data")
    assert str(tmp_path / "data") in str(caught.value) and os.strerror(number) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["text"], "nothing half-written stays"
    monkeypatch.undo()
    assert prepare_data(recipe, tmp_path / "data").splits["train"].documents > 0


PROCESS = """
    import os, resource, signal, sys
    from dataclasses import replace
    from pathlib import Path
    from spannorm.errors import InputError
    from spannorm.train.data import prepare_data
    from spannorm.train.recipe import DataRecipe

    text, place = sys.argv[1], Path(sys.argv[2])
    recipe = DataRecipe(corpus=text, validation_fraction=0.1, test_fraction=0.1)
    bpe = replace(recipe, tokenizer="bpe", vocab_size=290)
    for name, one in [("bytes", recipe), ("bpe", bpe)]:
        print(prepare_data(one, place / name).sha256)
    # The first limit stops the token files, the second the tokenizer's own.
    for one, limit in [(recipe, 20_000), (bpe, 4096)]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            prepare_data(one, place / "limited")
        except InputError as error:
            print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(sorted(os.listdir(place)))
    sys.stdout.flush()
    os.fsync = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    prepare_data(bpe, place / "killed")
"""


def test_in_a_second_process(small: TokenData, tmp_path: Path) -> None:
    """Same tokens under another hash seed; a write that the system refuses; a kill in the middle."""
    script = textwrap.dedent(PROCESS)
    environment = os.environ | {"PYTHONHASHSEED": "77", "TOKENIZERS_PARALLELISM": "false"}
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, small.recipe.corpus, str(tmp_path)],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert ran.returncode == -9, ran.stderr
    bytes_hash, bpe_hash, refused, refused_tokenizer, left = ran.stdout.splitlines()
    assert bytes_hash == small.sha256
    for message in (refused, refused_tokenizer):
        assert str(tmp_path / "limited") in message and "File too large" in message
    assert left == "['bpe', 'bytes']"

    recipe = DataRecipe(**{**vars(small.recipe), "tokenizer": "bpe", "vocab_size": 290})
    assert not (tmp_path / "killed").exists()
    (partial,) = tmp_path.glob(".killed.*")
    with partial_folder(tmp_path / "killed") as held:
        sweep_partial(tmp_path)
        assert held.exists(), "a process is still at work on it"
    assert not partial.exists(), "its process is dead"
    data = prepare_data(recipe, tmp_path / "killed")
    assert data.sha256 == bpe_hash, "training a tokenizer is deterministic across processes"
    assert not list(tmp_path.glob(".killed.*")) and len(BPE) == data.vocab_size


def test_process_that_comes_second_takes_what_is_there(
    small: TokenData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = data_module._plan

    def overtaken(recipe: DataRecipe) -> object:
        monkeypatch.setattr(data_module, "_plan", plan)
        prepare_data(recipe, tmp_path / "data")
        return plan(recipe)

    monkeypatch.setattr(data_module, "_plan", overtaken)
    assert prepare_data(small.recipe, tmp_path / "data").sha256 == small.sha256
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


# Sequences


def test_training_sequences_visit_every_window_once_per_epoch(small: TokenData) -> None:
    length = 64
    tokens = small.tokens("train")
    windows = len(tokens) // length
    sequences = TrainingSequences(small, length, count=2 * windows + 5, seed=3)
    seen = [tuple(item["input_ids"].tolist()) for item in sequences]
    assert len(seen) == len(sequences) == 2 * windows + 5
    cut = sorted(tuple(tokens[i * length : (i + 1) * length].tolist()) for i in range(windows))
    first, second = seen[:windows], seen[windows : 2 * windows]
    assert sorted(first) == sorted(second) == cut
    assert first != second and first != cut and len(set(seen[2 * windows :])) == 5
    for index in (-1, len(sequences)):
        with pytest.raises(IndexError):
            sequences[index]


def test_training_sequences_resume_anywhere(small: TokenData) -> None:
    def run(seed: int = 0) -> TrainingSequences:
        return TrainingSequences(small, 32, count=2000, seed=seed)

    straight = [item["input_ids"].tolist() for item in run()]
    for index in (1999, 0, 700, 701, 5):  # a fresh object each time, so nothing is remembered
        item = run()[index]
        assert item["input_ids"].tolist() == straight[index] == item["labels"].tolist()
        assert item["input_ids"].dtype == item["labels"].dtype and item["input_ids"].shape == (32,)
    assert str(item["input_ids"].dtype) == "torch.int64"
    assert [run(seed=1)[i]["input_ids"].tolist() for i in range(20)] != straight[:20]


def test_order_of_a_seed_never_changes(tmp_path: Path) -> None:
    """Written down, because a run must find its place again whatever the version of NumPy."""
    texts = [f"{i:07}" for i in range(12)]  # with its end, each is one window
    data = prepare_data(write_corpus(tmp_path / "text", texts), tmp_path / "data")
    kept = [int(text) for text in split_documents(data, "train")]
    sequences = TrainingSequences(data, 8, count=2 * len(kept), seed=5)
    order = [int(bytes(item["input_ids"][:7].tolist())) for item in sequences]
    assert kept == [1, 3, 4, 5, 6, 7, 8, 9]
    assert order == [9, 6, 5, 7, 8, 4, 1, 3, 9, 8, 3, 7, 6, 4, 1, 5]


def test_sequences_go_to_other_processes_without_the_tokens(small: TokenData) -> None:
    sequences = TrainingSequences(small, 32, count=12, seed=0)
    expected = [item["input_ids"].tolist() for item in sequences]
    pickled = pickle.dumps(sequences.windows)
    assert len(pickled) < 3000 < sum(split.tokens for split in small.splits.values())
    assert [item["input_ids"].tolist() for item in pickle.loads(pickle.dumps(sequences))] == expected
    loaded = DataLoader(sequences, batch_size=4)
    assert [row for batch in loaded for row in batch["input_ids"].tolist()] == expected


@pytest.mark.parametrize("count", [1, 3, 7, 10_000])
def test_evaluation_sequences_are_spread_and_do_not_overlap(small: TokenData, count: int) -> None:
    tokens = small.tokens("validation")
    windows = len(tokens) // 16
    sequences = evaluation_sequences(small, "validation", 16, count)
    cut = [tokens[i * 16 : i * 16 + 16].tolist() for i in range(windows)]
    places, start = [], 0
    for i in range(len(sequences)):  # type: ignore[arg-type]
        start = cut.index(sequences[i]["input_ids"].tolist(), start)
        places.append(start)
        start += 1
    assert len(places) == min(count, windows)
    steps = np.diff([*places, windows + places[0]])
    assert steps.max() - steps.min() <= 1


def test_split_shorter_than_a_sequence(small: TokenData) -> None:
    held = small.splits["validation"].tokens
    with pytest.raises(InputError) as caught:
        evaluation_sequences(small, "validation", held + 1, 4)
    assert str(caught.value) == (
        f"the validation split holds {held} tokens, fewer than one sequence of {held + 1}: use a larger corpus, "
        "a larger data.validation_fraction, or a smaller train.sequence_length."
    )
    with pytest.raises(InputError, match="the train split holds"):
        TrainingSequences(small, 10**9, 4, seed=0)
    assert len(evaluation_sequences(small, "validation", held, 4)) == 1  # type: ignore[arg-type]
