"""The folder of a run while somebody works in it: one process group at a time, and nothing half-written left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from lightning.fabric import Fabric

from compress.manifest import RunFolder
from compress.run.pseudo_labels import LabellingPlan
from compress.training.distributed import on_first_process
from compress.training.place import remove_replaced
from deploy.core.errors import UserError
from deploy.core.files import remove_temporaries, write_text
from deploy.core.lock import locked
from deploy.core.storage import pull, push


@contextmanager
def working_in(folder: RunFolder, fabric: Fabric) -> Iterator[None]:
    """Hold the lock of a run folder, which is created: process 0 for all of them. One at an address is brought up to
    date here first, and there in the end.

    Raises UserError at once where another process works there.
    """
    with ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(locked(folder.lock, str(folder.path)))
            pull(folder.path)
            remove_temporaries(folder.path)
            remove_replaced(folder)

        on_first_process(fabric, begin)
        yield
        on_first_process(fabric, lambda: push(folder.path))


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Hold the lock of the run folder that a file will lie in, if it lies in one. Raises UserError as `working_in`."""
    folder = RunFolder(file.parent)
    if not folder.manifest.is_file():
        yield
        return
    with locked(folder.lock, str(folder.path)):
        remove_temporaries(folder.path)
        yield


def need_whole(folder: RunFolder, labelling: LabellingPlan | None) -> None:
    """Raise UserError for an interrupted run, which is only continued when asked to."""
    unfinished = folder.unfinished()
    if labelling is not None and labelling.is_unfinished():
        unfinished.append("the labelling")
    if not unfinished:
        return
    name = unfinished[0]
    how, otherwise = "", "remove the folder to start again"
    if name.endswith(".new"):
        how, otherwise = " with its recipe", f"remove {folder.path / name} to keep what was finished before"
    raise UserError(
        f"{folder.path} holds an interrupted run ({name} is unfinished); add --resume to continue it{how}, "
        f"or {otherwise}"
    )


def about_what_is_left(folder: RunFolder) -> list[str]:
    """One line for each training that is still unfinished where a run has ended: it has other settings."""
    return [
        f"note: {folder.path / name} holds an interrupted training with other settings; its own recipe continues it "
        "with --resume, and the next run asks for that; or remove the folder"
        for name in folder.unfinished()
    ]


def write_recipe(folder: RunFolder, text: str, *, whole: bool) -> None:
    """Put the resolved recipe beside the student that it makes. whole: its trainings are done; until then a recipe.yaml
    beside a finished student stays the one that made it."""
    if whole or not folder.weights().is_file():
        write_text(folder.recipe, text)
