"""The command line: arguments only. Each verb calls one public function, which it imports when it is called."""

from spannorm.cli.app import app
from spannorm.cli.main import main

__all__ = ["app", "main"]
