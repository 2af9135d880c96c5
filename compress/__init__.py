"""Distill a large object detector into a small one that ships, and prove that it survived."""

from __future__ import annotations

__version__ = "0.1.0"


def foreign_kernels() -> str | None:
    """One line about another package called `kernels` that hides ours, or None when all is well.

    Hugging Face publishes a package that is imported under the same name. Nothing is imported here.
    """
    from importlib.util import find_spec
    from pathlib import Path

    spec = find_spec("kernels")
    found = Path(next(iter(spec.submodule_search_locations or [""]))) if spec else None
    if found is not None and (found / "ops" / "quality_focal_loss.py").is_file():
        return None
    what = f"the package 'kernels' at {found} is not ours" if found else "our package 'kernels' is not installed"
    return (
        f"{what} (Hugging Face publishes one of that name): pip uninstall -y kernels; "
        "pip install --force-reinstall --no-deps compress-detectors"
    )


def require_own_kernels() -> None:
    """Raise ImportError, in one line, when `foreign_kernels` has something to say."""
    problem = foreign_kernels()
    if problem:
        raise ImportError(problem, name="kernels")
