"""`spannorm publish`: a folder with all files that are needed to load a model, and its upload to the Hub.

config.json, generation_config.json, model.safetensors      as `save_pretrained` writes them
modeling_spannorm.py    the whole model in one file, for `trust_remote_code=True`   (see bundle.py)
tokenizer files         if the model has a tokenizer
README.md, curves.png, init_receipt.txt                     the model card          (see card.py)
published.json          how the folder was made; a folder with this file may be overwritten
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from transformers import AutoTokenizer, PreTrainedConfig

import spannorm
from spannorm import folders, models
from spannorm.auto_code import AUTO_CODE
from spannorm.errors import InputError
from spannorm.files import make_folder, read_json, read_jsonl, write_json, write_text, writing_to
from spannorm.loading import opening
from spannorm.publishing.bundle import model_file
from spannorm.publishing.card import CURVES, RECEIPT, Facts, draw_curves, model_card
from spannorm.rewiring.configuration import MODEL_TYPE as REWIRED
from spannorm.train.evaluation import RUN, model_folder
from spannorm.train.recorder import RECORD, RECORDS
from spannorm.train.run import RESULT, RESULT_SHAPE, quiet
from spannorm.train.tokenizer import is_bytes

PUBLISHED = "published.json"
HUB = "hub:"


def publish(directory: Path, to: str | None = None, *, private: bool = True) -> str:
    """Make a self-contained folder of a trained model, and upload it if `to` is a Hub repository.

    Args:
        directory: the folder of a run, of a comparison's job, or of a model of ours that `save_pretrained` wrote.
        to: a folder, None for `directory/published`, or `hub:OWNER/NAME`. Only `hub:` uploads.
        private: whether a new repository on the Hub is private.

    Returns:
        The folder, or the address on the Hub.

    Raises:
        InputError: no model of ours, a folder that holds something else, a placement without its source, no connection
            to the Hub.
    """
    if to is not None and to.startswith(HUB):
        name = to.removeprefix(HUB)
        with tempfile.TemporaryDirectory() as temporary:
            _fill(Path(temporary), directory, name.rpartition("/")[2])
            return _upload(Path(temporary), name, private)
    out = Path(os.path.abspath(to or directory / "published"))
    empty = out.is_dir() and not any(out.iterdir())
    if out.is_symlink() or (out.exists() and not empty and not (out / PUBLISHED).is_file()):
        raise InputError(f"{out} holds something else than a published model: choose another folder with --to.")
    make_folder(out.parent)
    new, old = (out.with_name(f".{out.name}.{os.getpid()}.{word}") for word in ("new", "old"))
    try:
        with writing_to(out.parent):
            new.mkdir()
            _fill(new, directory, directory.absolute().name if to is None else out.name)
            if out.exists() and not empty:
                _check_ours(out, new)
            if out.exists():
                out.rename(old)
            new.rename(out)
    finally:
        if old.exists() and not out.exists():
            old.rename(out)
        for folder in (new, old):
            shutil.rmtree(folder, ignore_errors=True)
    return str(out)


def _check_ours(out: Path, new: Path) -> None:
    """Refuse to replace a folder with files that publishing did not write."""
    before = read_json(out / PUBLISHED, {"spannorm": str, "placement": str, "files?": [str]}).get("files") or ()
    ours = {path.name for path in new.iterdir()} | set(before)
    strange = sorted(path.name for path in out.iterdir() if path.name not in ours)
    if strange:
        raise InputError(
            f"{out} holds more than a published model ({', '.join(strange[:5])}), which would be lost: move it out, "
            "or choose another folder with --to."
        )


def _fill(out: Path, directory: Path, name: str) -> None:
    """Write everything into an empty folder."""
    path = model_folder(directory)
    quiet()
    with opening(path):
        kind = _class_of(path)
        model = kind.from_pretrained(path)
    config = model.config
    code = model_file(config.placement)
    model.save_pretrained(out)
    write_text(out / f"{AUTO_CODE}.py", code)
    tokenizer = ""
    if (path / "tokenizer_config.json").is_file():
        loaded: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        loaded.save_pretrained(out)
        tokenizer = "bytes" if is_bytes(loaded) else "own"
    receipt = str(kind(config).init_receipt())
    write_text(out / RECEIPT, receipt + "\n")
    run = read_json(directory / RUN, folders.RUN.shape) if (directory / RUN).is_file() else None
    result = read_json(directory / RESULT, RESULT_SHAPE) if run is not None and (directory / RESULT).is_file() else None
    facts = Facts(
        name=name, config=config, architecture=kind.__name__, parameters=model.num_parameters(), tokenizer=tokenizer,
        receipt=receipt.splitlines()[-1], run=run, result=result,
        curves=draw_curves(read_jsonl(directory / RECORDS, RECORD), out / CURVES), version=spannorm.__version__,
    )  # fmt: skip
    write_text(out / "README.md", model_card(facts))
    write_json(out / PUBLISHED, {
        "files": sorted([PUBLISHED, *(path.name for path in out.iterdir())]),
        "spannorm": spannorm.__version__,
        "placement": config.placement,
        f"{AUTO_CODE}_sha256": hashlib.sha256(code.encode()).hexdigest(),
        "data_sha256": None if run is None else run["data"]["sha256"],
    })  # fmt: skip
    for file in out.iterdir():  # safetensors writes files that only the owner can read
        shutil.copymode(out / "README.md", file)


def _class_of(path: Path) -> Any:
    """The class of a saved model of ours."""
    saved, _ = PreTrainedConfig.get_config_dict(path)
    if saved.get("model_type") == REWIRED:
        raise InputError(
            f"{path} holds a rewired model, whose code is its family's and spannorm's: publish takes models of "
            "spannorm's own. Share the folder as it is; it opens with spannorm installed."
        )
    names = saved.get("architectures") or []
    if saved.get("model_type") != models.SpanNormConfig.model_type or len(names) != 1 or not hasattr(models, names[0]):
        raise InputError(
            f"{path} holds a model of type {saved.get('model_type')!r} with the architectures {names}: publish takes "
            f"{', '.join(name for name in models.__all__ if name != 'SpanNormConfig')}."
        )
    return getattr(models, names[0])


def _upload(folder: Path, name: str, private: bool) -> str:
    """Put the folder's files into a repository on the Hub, which is made if it does not exist."""
    api = HfApi()
    try:
        if api.repo_exists(name) and not api.file_exists(name, PUBLISHED):
            raise InputError(f"{name} on the Hub holds something else than a published model: choose another name.")
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message=f"spannorm {spannorm.__version__}")
    except InputError:
        raise
    except Exception as error:  # the client raises its network library's errors, and that library has changed
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(
            f"cannot upload to {name} on the Hub ({reason}): log in with `hf auth login`, and see that the network is "
            "there. Without it, --to FOLDER makes the same files."
        ) from None
    return f"https://huggingface.co/{name}"
