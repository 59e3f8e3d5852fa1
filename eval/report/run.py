"""A profile and what was measured of its mixes, as files: the page, still pictures, a block for model cards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.report.data import gather
from recompile.errors import ArgumentError
from recompile.events import Note, OnEvent, Said, ignore
from recompile.io.files import check_outputs, write_text


@dataclass(frozen=True)
class ReportRequest:
    """What is shown beside the profile, and which files are made; None: not that one."""

    reports: Sequence[Path] = ()  # of `model_diff --json` or `model_optimize --json`
    variants: Sequence[Path] = ()  # builds to list with their sizes
    recipes: Sequence[Path] = ()  # override files to show as predicted points
    out: Path | None = None  # the page
    png: Path | None = None  # a directory of pictures
    svg: Path | None = None
    card: Path | None = None  # Markdown; "-": only returned
    title: str | None = None
    bits: float | None = None  # bits per weight that the page opens with
    force: bool = False  # replace files that this tool did not make


def write_report(profile: Path, request: ReportRequest, on_event: OnEvent = ignore) -> str | None:
    """Write the files that are asked for; returns the text of the card, where one is. Nothing is written where
    one of them may or can not be. Raises JournalError, OutputError, RecompileError."""
    pictured = {kind: folder for kind, folder in (("png", request.png), ("svg", request.svg)) if folder is not None}
    if request.out is None and request.card is None and not pictured:
        raise ArgumentError("nothing to write: give {out} report.html, {png} DIR, {svg} DIR or {card} FILE")
    data = gather(profile, request.reports, request.variants, request.recipes, request.title, request.bits)
    for note in data.notes:
        on_event(Note(note, "Warning"))
    outputs: list[dict[str, Path | None]] = [{"{out}": request.out, "{card}": request.card}]
    if pictured:
        from eval.report.pictures import check_drawing, pictures, write_pictures

        check_drawing()
        outputs = [
            outputs[0] | {f"{{{kind}}}": folder / f"{picture.name}.{kind}" for kind, folder in pictured.items()}
            for picture in pictures(data)
        ]
    inputs = [profile, *request.reports, *request.variants, *request.recipes]
    for files in outputs:
        check_outputs(files, inputs, force=request.force)
    text = None
    if request.card is not None:
        from eval.report.card import card

        text = card(data)
    if request.out is not None:
        from eval.report.page import render

        write_text(request.out, render(data))
        on_event(Said(f"Wrote {request.out} ({request.out.stat().st_size / 1e6:.1f} MB)"))
    for kind, folder in pictured.items():
        for path in write_pictures(data, folder, kind):
            on_event(Said(f"Wrote {path}"))
    if text is not None and request.card is not None and str(request.card) != "-":
        write_text(request.card, text)
        on_event(Said(f"Wrote {request.card}"))
    return text
