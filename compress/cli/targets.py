"""What `compress export` makes of an exported file: files for other runtimes, and other forms of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from deploy.core.errors import UserError
from deploy.core.files import ONNX_SUFFIX, need_place
from deploy.core.precisions import PRECISIONS
from deploy.targets.table import REFUSED, TARGETS, check_refusals, place_for


@dataclass(frozen=True)
class OtherFlags:
    """Options of what is made of an exported file besides."""

    for_: Annotated[
        str | None,
        typer.Option("--for", metavar="NAME,NAME", help=f"Also files for other runtimes: {', '.join(TARGETS)}."),
    ] = None
    web_runtime: Annotated[
        Path | None,
        typer.Option(
            "--web-runtime", metavar="DIR", help="Its runtime for --for web, unpacked. Default: npm brings it."
        ),
    ] = None
    static_batch: Annotated[
        int | None, typer.Option("--static-batch", min=1, help="Also a file that takes this batch size alone.")
    ] = None
    labels: Annotated[Literal["int32"] | None, typer.Option("--labels", help="Also a file with such labels.")] = None
    input: Annotated[
        Literal["float"] | None, typer.Option("--input", help="Also a file that takes pixels as float32, 0 to 255.")
    ] = None
    heads_only: Annotated[
        bool, typer.Option("--heads-only", help="Also the network alone; its caller decodes and suppresses.")
    ] = False

    @property
    def form(self) -> bool:
        """Another form is wanted: one file with all of it."""
        return any(value is not None for value in (self.static_batch, self.labels, self.input))

    @property
    def any(self) -> bool:
        return self.form or self.heads_only or self.for_ is not None

    @property
    def targets(self) -> list[str]:
        """The runtimes of --for. Raises UserError for an unknown one."""
        names = [] if self.for_ is None else [name.strip() for name in self.for_.split(",")]
        for name in names:
            if name in REFUSED:
                raise UserError(f"--for {name}: {REFUSED[name]}")
            if name not in TARGETS:
                raise UserError(f"--for: '{name[:60]}' is none of {', '.join(TARGETS)}")
        return list(dict.fromkeys(names))


def keep_runtimes(wanted: OtherFlags, targets: Sequence[str]) -> None:
    """Take what a target ships of its runtime out of --web-runtime, before anything is made.

    targets: `wanted.targets`. Raises UserError where none of them ships one, or it is not in there.
    """
    if wanted.web_runtime is None:
        return
    takers = [keep for name in targets if (keep := TARGETS[name].keep_runtime) is not None]
    if not takers:
        raise UserError("--web-runtime: is about a page; add --for web")
    for keep in takers:
        keep(wanted.web_runtime)


def check_targets(precisions: Sequence[str], path_of: Callable[[str], Path], targets: Sequence[str]) -> None:
    """Raise UserError, before anything is made, where a target gets no file of one of the precisions. path_of: the file
    of a precision."""
    for name in precisions:
        network = "int8" if PRECISIONS[name].quantized else name
        for target in targets:
            check_refusals(target, path_of(name), network)


def make_others(
    files: Sequence[Path], targets: Sequence[str], wanted: OtherFlags, out: Path | None = None
) -> list[Path]:
    """Make of each exported file what was asked for, and say so. Returns what was written.

    targets: `wanted.targets`. out: where it goes, of one file and one wish; None: beside the file.
    """
    if out is not None and len(files) * (len(targets) + wanted.form + wanted.heads_only) > 1:
        raise UserError(f"--out: {out} names one file, and several are made; leave it out")
    from deploy.targets.make import make_for

    made = []
    for file in files:
        if wanted.form:
            made.append(_formed(file, wanted, out))
        if wanted.heads_only:
            made.append(_heads(file, out))
        for name in targets:
            place = place_for(file, name, out)
            if not TARGETS[name].folder:
                need_place(place)
            print(f"{place}: {make_for(name, file, place)}")
            made.append(place)
    return made


def _formed(file: Path, flags: OtherFlags, out: Path | None) -> Path:
    from deploy.core.card import Form
    from deploy.graph.form import reform

    form = Form(
        batch=flags.static_batch, labels=flags.labels or "int64", images="uint8" if flags.input is None else "float32"
    )
    parts = [f"batch{form.batch}"] if form.batch else []
    parts += [name for name, given in ((form.labels, flags.labels), (form.images, flags.input)) if given is not None]
    place = file.with_name(".".join([file.name.removesuffix(ONNX_SUFFIX), *parts]) + ONNX_SUFFIX)
    place = _onnx_place(place if out is None else out)
    card = reform(file, place, form)
    print(f"{place}: {card.form.in_words()}; computes what {file.name} does, to the bit")
    return place


def _heads(file: Path, out: Path | None) -> Path:
    from deploy.graph.heads import cut_heads
    from deploy.targets.table import DECODERS

    place = _onnx_place(
        file.with_name(file.name.removesuffix(ONNX_SUFFIX) + f".heads{ONNX_SUFFIX}") if out is None else out
    )
    heads = cut_heads(file, place).form.heads
    assert heads is not None
    print(f"{place}: gives {', '.join(heads.names)}; decode them as in {DECODERS}")
    return place


def _onnx_place(place: Path) -> Path:
    """Raises UserError unless an .onnx file can be written there."""
    if place.suffix != ONNX_SUFFIX:
        raise UserError(f"--out: {place} does not end in {ONNX_SUFFIX}")
    need_place(place)
    return place
