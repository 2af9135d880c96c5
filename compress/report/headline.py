"""Head of the page: one to four sentences and five tiles, made only of measured figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compress.manifest import BASELINE, FINE_TUNED, STUDENT, TEACHER
from compress.report.document import Artifact, Figures, Report
from compress.report.text import figure, milliseconds, percent, ratio, signed


def first_lines(report: Report) -> str:
    """Say what was compressed and by how much, in sentences made only of measured figures. Of a pruned student: what it
    keeps of the teacher, its fastest file, the same detector without teacher, and how many images say so."""
    models = report.models
    if models.student is not None and models.is_pruned:
        keeps = "keeps" if report.pruning is None or report.pruning.of == TEACHER else "has"
        words = [_share(models.teacher, models.student, keeps), _file(report), _alone(report, models.student)]
        words.append(_nothing_to_teach(report))
        if report.validation_images:
            words.append(f"One seed; mAP on {report.validation_images:,} validation images.")
        return " ".join(filter(None, words))
    return headline(report)


def headline(report: Report) -> str:
    """Those of a student that is not pruned."""
    models = report.models
    teacher, baseline, student = models.teacher, models.baseline, models.student
    if student is None:
        return "This run has no student figures: there is nothing to compare yet."
    sentences = []
    sizes = []
    if teacher:
        for what, big, small in (
            ("parameters", teacher.params_m, student.params_m),
            ("operations", teacher.gflops, student.gflops),
        ):
            if big and small:
                sizes.append(f"{big / small:.1f}× fewer {what}" if big >= small else f"{small / big:.1f}× more {what}")
    kept = None
    if teacher and teacher.map and student.map is not None:
        kept = f"reaches {student.map:.1f} mAP against the teacher's {teacher.map:.1f}"
    if sizes and kept:
        sentences.append(f"The student has {' and '.join(sizes)}, and {kept}.")
    elif sizes:
        sentences.append(f"The student has {' and '.join(sizes)}; its mAP was not compared with the teacher's.")
    elif kept:
        sentences.append(f"The student {kept}.")
    elif student.map is not None:
        sentences.append(f"The student reaches {student.map:.1f} mAP.")
    else:
        sentences.append("The student's mAP was not measured.")
    if baseline and baseline.map is not None and student.map is not None:
        gain, found = student.map - baseline.map, report.compared(STUDENT, BASELINE)
        sure = f" ({found.in_words()})" if found else ""
        if round(gain, 1) == 0:
            sentences.append(f"It ends level with the same student trained from the labels alone{sure}.")
        else:
            word = "above" if gain > 0 else "below"
            alone = "the same student trained from the labels alone"
            sentences.append(f"That is {abs(gain):.1f} points {word} {alone}{sure}.")
    sentences.append(_nothing_to_teach(report))
    best = fastest(report.files)
    if best and best.map is not None:
        sentences.append(
            f"Exported as {best.file}, it answers in {milliseconds(best.p50)} (median) at {best.map:.1f} mAP."
        )
    else:
        sentences.append(_badly_timed(report.files))
    return " ".join(filter(None, sentences))


@dataclass(frozen=True)
class Tile:
    """A figure in large type. tone: CSS class of the note: good, bad or nothing."""

    label: str
    value: str
    unit: str
    note: str
    tone: str = ""


def tiles(report: Report) -> list[Tile]:
    """mAP, parameters, compute, latency and gate of the student."""
    models = report.models
    teacher, baseline = models.teacher or Figures(), models.baseline or Figures()
    student = models.student or Figures()
    row = [Tile("Student mAP", figure(student.map, 1), "", "not measured")]
    if student.map is not None:
        if baseline.map is not None:
            gain, found = student.map - baseline.map, report.compared(STUDENT, BASELINE)
            noise = found is not None and found.is_noise
            tone = "" if noise else "good" if gain > 0 else "bad"
            note = f"{signed(gain, 1)} over the baseline" + ", cannot be told from noise" * noise
            row[0] = Tile("Student mAP", figure(student.map, 1), "", note, tone)
        else:
            row[0] = Tile("Student mAP", figure(student.map, 1), "", "no baseline to compare with")
        if models.is_pruned and teacher.map:
            note = f"{percent(student.map / teacher.map)} of the teacher's {teacher.map:.1f}"
            row[0] = Tile("Student mAP", figure(student.map, 1), "", note)
    for label, unit, big, small in (
        ("Parameters", "M", teacher.params_m, student.params_m),
        ("Compute", "GFLOPs", teacher.gflops, student.gflops),
    ):
        note = "not measured" if small is None else "no teacher to compare with"
        if big and small:
            note = f"{figure(big, 1)} {unit} in the teacher: {ratio(big, small)}"
        row.append(Tile(label, figure(small, 2 if (small or 0) < 10 else 1), unit if small is not None else "", note))
    return [*row, _latency_tile(report.files), _gate_tile(report)]


def _latency_tile(files: Sequence[Artifact]) -> Tile:
    best = fastest(files)
    if best:
        return Tile("Latency, median", figure(best.p50, 2), "ms", best.file)
    why = "not measured well" if _doubted(files) else "no file passed its gate"
    return Tile("Latency, median", "–", "", why if any(a.p50 is not None for a in files) else "not measured")


def _gate_tile(report: Report) -> Tile:
    """How many files passed. The student in PyTorch is what they are compared with, and counts only where it fails."""
    files, student = report.files, report.in_torch(STUDENT)
    if not files:
        return Tile("Accuracy gate", "–", "", "no artifact was exported")
    passed, failed = (sum(a.gate == gate for a in files) for gate in ("pass", "fail"))
    idle = len(files) - passed - failed
    words = [f"{failed} failed"] * bool(failed) + [f"{idle} not run"] * bool(idle)
    if student is not None and student.gate == "fail":
        words, failed = [*words, "the student itself fails against training"], failed + 1
    tone = "bad" if failed else "" if idle else "good"
    return Tile("Accuracy gate", f"{passed} of {len(files)}", "passed", ", ".join(words) or "all passed", tone)


def _share(teacher: Figures | None, student: Figures, keeps: str) -> str:
    """How much of the teacher's operations, or else parameters, and of its mAP a pruned student has. keeps: a verb."""
    whole, kept = teacher or Figures(), []
    if whole.gflops and student.gflops:
        kept.append(f"{percent(student.gflops / whole.gflops)} of the teacher's operations")
    elif whole.params_m and student.params_m:
        kept.append(f"{percent(student.params_m / whole.params_m)} of the teacher's parameters")
    if whole.map and student.map is not None:
        whose = "its" if kept else "the teacher's"
        kept.append(f"{percent(student.map / whole.map)} of {whose} mAP ({student.map:.1f} of {whole.map:.1f})")
    elif student.map is not None:
        reaches = f"reaches {student.map:.1f} mAP"
        return f"The student {keeps} {kept[0]} and {reaches}." if kept else f"The pruned student {reaches}."
    return f"The student {keeps} {' and '.join(kept)}." if kept else "The student's mAP was not measured."


def _file(report: Report) -> str:
    """The fastest file that passed its gate, against the teacher in PyTorch; and the student there, whose factor is the
    cut's alone."""
    best = fastest(report.files)
    if best is None or best.p50 is None:
        unknown = "No file passed its gate with a measured latency."
        return _badly_timed(report.files) or (unknown if report.files else "")
    teacher, student = (
        None if row is None else row.well_timed for row in (report.in_torch(TEACHER), report.in_torch(STUDENT))
    )
    speed = f"answers in {milliseconds(best.p50)} (median)"
    if teacher:
        times = f"{milliseconds(best.p50)} against {milliseconds(teacher)}, medians of one image"
        if student:
            times += f"; in PyTorch the student is {teacher / student:.1f} times as fast"
        speed = f"is {teacher / best.p50:.1f} times as fast as the teacher in PyTorch ({times})"
    if best.map_drop is None:
        return f"Its file {best.file} {speed}."
    change = f"{'loses' if best.map_drop > -0.05 else 'gains'} {abs(best.map_drop):.1f} mAP in the conversion"
    return f"Its file {best.file} {speed} and {change}."


def _alone(report: Report, student: Figures) -> str:
    """The same architecture trained from the labels alone: from random weights, and from those that the cut left; and
    what the rest adds to the latter."""
    models = report.models
    scratch = models.baseline.map if models.baseline else None
    tuned = models.fine_tuned.map if models.fine_tuned else None
    reached = [] if scratch is None else [f"trained from scratch on the same labels reaches {scratch:.1f}"]
    if tuned is not None:
        reached.append(f"pruned and fine-tuned on labels alone {'' if reached else 'reaches '}{tuned:.1f}")
    if not reached:
        return ""
    words = f"The same small detector {', '.join(reached)}"
    if tuned is None or student.map is None:
        return f"{words}."
    gain, found = round(student.map - tuned, 1), report.compared(STUDENT, FINE_TUNED)
    what, several = _taught_by(report)
    s, sure = "" if several else "s", f" ({found.in_words()})" if found else ""
    if gain == 0:
        return f"{words}: {what} make{s} no difference{sure}."
    return f"{words}: {what} {'add' if gain > 0 else 'cost'}{s} {abs(gain):.1f}{sure}."


def _nothing_to_teach(report: Report) -> str:
    """Say so where the teacher is not above what the labels alone reach; empty where it is, or nobody knows."""
    alone = FINE_TUNED if report.models.fine_tuned else BASELINE
    found = report.compared(TEACHER, alone)
    if found is None or found.low > 0 or report.models.teacher is None or report.models.teacher.map is None:
        return ""
    lead = f"{signed(found.points, 1)} over the student trained from the labels alone"
    if found.points > 0:
        return f"These images cannot show whether the teacher has anything to teach: {lead} ({found.in_words()})."
    return f"The teacher has nothing to teach that these images show: {lead} ({found.in_words()})."


def _taught_by(report: Report) -> tuple[str, bool]:
    """What the student learned from besides labels, and whether the word is a plural."""
    labelled = report.pseudo_labels is not None
    if labelled and report.methods is not None:
        return "distillation and pseudo labels" if report.methods else "pseudo labels", True
    return "the teacher" if labelled else "distillation", False


def fastest(files: Sequence[Artifact]) -> Artifact | None:
    """The lowest median among the files that passed their gate, of those that were measured well."""
    timed = [(a.well_timed, index) for index, a in enumerate(files) if a.gate == "pass" and a.well_timed is not None]
    return files[min(timed)[1]] if timed else None


def _doubted(files: Sequence[Artifact]) -> Artifact | None:
    """The first file that passed its gate, and was timed, but not well."""
    return next((a for a in files if a.gate == "pass" and a.p50 is not None and a.latency_doubts), None)


def _badly_timed(files: Sequence[Artifact]) -> str:
    """Say that no latency is worth a sentence; empty where none was measured. Page and terminal have the command below,
    with the files' paths."""
    found = _doubted(files)
    if found is None:
        return ""
    return (
        f"How fast {found.file} is was not measured well ({'; '.join(found.latency_doubts)}); a command below "
        "repeats it."
    )
