"""The command line: `main` runs it, `app` is its table of commands."""

from compress.cli.app import app, main

__all__ = ["app", "main"]
