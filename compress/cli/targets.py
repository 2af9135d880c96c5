"""What `compress export` makes of an exported file: files for other runtimes, and other forms of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from compress.cli.options import FormFlags, values_of
from deploy.core.errors import UserError
from deploy.core.files import ONNX_SUFFIX, need_place
from deploy.targets.table import TARGETS, place_for

For = Annotated[
    str | None,
    typer.Option("--for", metavar="NAME,NAME", help=f"Also files for other runtimes: {', '.join(TARGETS)}."),
]
WebRuntime = Annotated[
    Path | None,
    typer.Option(
        "--web-runtime", metavar="DIR", help="ONNX Runtime Web for --for web, unpacked. Default: npm fetches it once."
    ),
]


def target_names(text: str | None) -> list[str]:
    """The runtimes of --for. Raises UserError for an unknown one."""
    names = [] if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in TARGETS:
            raise UserError(f"--for: '{name[:60]}' is none of {', '.join(TARGETS)}")
    return list(dict.fromkeys(names))


def keep_runtime(folder: Path | None, targets: Sequence[str]) -> None:
    """Take --web-runtime, if it was given. Raises UserError where no target ships one."""
    takers = [TARGETS[name].keep_runtime for name in targets]
    keep = next((taker for taker in takers if taker is not None), None)
    if folder is not None and keep is None:
        raise UserError("--web-runtime: is about --for web; add it")
    if folder is not None and keep is not None:
        keep(folder)


def make_others(files: Sequence[Path], targets: Sequence[str], form: FormFlags, out: Path | None = None) -> list[Path]:
    """Make of each exported file what was asked for, and say so. Returns what was written.

    out: where it goes, of one file and one wish; None: beside the file.
    """
    wished = any(value is not None for value in values_of(form).values())
    if out is not None and len(files) * (len(targets) + wished) > 1:
        raise UserError(f"--out: {out} names one file, and several are made; leave it out")
    made = []
    for file in files:
        if wished:
            made.append(_formed(file, form, out))
        for name in targets:
            place = place_for(file, name, out)
            if not TARGETS[name].folder:
                need_place(place)
            print(TARGETS[name].make(file, place))
            made.append(place)
    return made


def _formed(file: Path, flags: FormFlags, out: Path | None) -> Path:
    from deploy.core.card import Form
    from deploy.graph.form import reform

    form = Form(
        batch=flags.static_batch, labels=flags.labels or "int64", images="uint8" if flags.input is None else "float32"
    )
    parts = [f"batch{form.batch}"] if form.batch else []
    parts += [name for name, given in ((form.labels, flags.labels), (form.images, flags.input)) if given is not None]
    place = file.with_name(".".join([file.name.removesuffix(ONNX_SUFFIX), *parts]) + ONNX_SUFFIX)
    place = place if out is None else out
    if place.suffix != ONNX_SUFFIX:
        raise UserError(f"--out: {place} does not end in {ONNX_SUFFIX}")
    need_place(place)
    card = reform(file, place, form)
    print(f"{place}: {card.form.in_words()}; the same answers as {file.name}, to the bit")
    return place
