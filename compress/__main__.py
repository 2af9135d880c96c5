"""`python -m compress` is the `compress` command."""

from __future__ import annotations

from compress.cli import main

main()
