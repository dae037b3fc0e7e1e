"""What torchrun starts in the tests: the runs that a JSON file lists, one after the other in the same processes.

The file holds [recipe file, output folder] pairs; the next argument is the folder of the tokens.
"""

import json
import sys
from pathlib import Path

import torch

from spannorm.train.processes import leave
from spannorm.train.recipe import load_recipe
from spannorm.train.run import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    for recipe, out in json.loads(Path(sys.argv[1]).read_text()):
        train(load_recipe(recipe), Path(out), data=Path(sys.argv[2]))
    leave()
