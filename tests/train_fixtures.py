"""A small corpus of real text, prepared once, and a recipe that trains in seconds."""

import shutil
import sysconfig
from pathlib import Path

import pytest

from spannorm.train.data import TokenData, prepare_data
from spannorm.train.recipe import DataRecipe, Recipe, recipe_from_dict

MODULES = ["abc", "bisect", "calendar", "cmd", "codeop", "colorsys", "contextlib", "copy", "csv", "dis", "enum"]
MODULES += ["fnmatch", "fractions", "functools", "getpass", "glob", "graphlib", "heapq", "inspect", "keyword"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with some modules of the standard library: real text, about half a megabyte."""
    folder = tmp_path_factory.mktemp("corpus")
    for name in MODULES:
        shutil.copy(Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py", folder)
    return folder


@pytest.fixture(scope="session")
def tokens(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenData:
    recipe = DataRecipe(corpus=str(corpus), validation_fraction=0.05, test_fraction=0.05)
    return prepare_data(recipe, tmp_path_factory.mktemp("tokens") / "data")


@pytest.fixture(scope="session")
def recipe(tokens: TokenData) -> Recipe:
    """Two blocks, forty steps, a second of training."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    train = {"steps": 40, "sequence_length": 32, "batch_size": 8, "learning_rate": 0.01, "warmup_steps": 4}
    train |= {"evaluation_sequences": 8, "checkpoint_every": 10, "probe_every": 20, "threads": 1}
    data = {"corpus": tokens.recipe.corpus, "validation_fraction": 0.05, "test_fraction": 0.05}
    return recipe_from_dict({"name": "tiny", "model": sizes, "data": data, "train": train})
