"""``sm-tiered timeline``: the run as a picture, one HTML page, or as a trace for Perfetto."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from sm_tiered.cli.common import EXIT_FAILED, EXIT_OK
from sm_tiered.cli.output import clean, note_error, print_json, render, size, text
from sm_tiered.cli.page import page
from sm_tiered.cli.told import Run, read_run, remarks
from sm_tiered.cli.trace import trace_of
from sm_tiered.errors import ConfigError, TieredError

__all__ = ["run"]

_PAGES, _TRACES = (".html", ".htm"), (".json",)


def run(sources: Sequence[str], *, output: str, as_json: bool) -> int:
    """Write what *sources* tell to the file *output*; return the exit status."""
    kind = _kind(output)
    found = read_run(sources)
    if kind == "page":
        written = page(found, made_at=time.time())
    else:
        written = json.dumps(trace_of(found), separators=(",", ":"), allow_nan=False)
    data = written.encode()
    _write(Path(output), data)
    if as_json:
        print_json(_document(found, output, kind, len(data)))
    else:
        for error in found.errors.values():
            note_error(error)
        render(*(text(line) for line in _lines(found, output, kind, len(data))))
    return EXIT_FAILED if found.errors else EXIT_OK


def _kind(output: str) -> str:
    lower = output.lower()
    if lower.endswith(_PAGES):
        return "page"
    if lower.endswith(_TRACES):
        return "trace"
    hint = "Allowed: a name that ends in .html (a page for a browser) or .json (a trace for ui.perfetto.dev)."
    raise ConfigError(f"--output: {clean(output)!r} tells no format", hint=hint)


def _write(path: Path, data: bytes) -> None:
    """Write a whole file or none, readable for this user alone: events may tell of more than a stranger should know."""
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}-"[:80], dir=path.parent)
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(data)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)
        raise TieredError(f"{clean(path)} can't be written: {error.strerror}") from error


def _lines(run: Run, output: str, kind: str, written: int) -> list[str]:
    story, ledger = run.story, run.ledger
    facts = [
        _count(story.launches, "launch", "launches"),
        _count(len(story.saves), "save", "saves"),
        _count(len(ledger.failures), "failure", "failures"),
    ]
    use = "open it in a browser" if kind == "page" else "open it in https://ui.perfetto.dev"
    return [f"{output}: {', '.join(facts)}, {size(written)}; {use}", *remarks(run)]


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _document(run: Run, output: str, kind: str, written: int) -> dict[str, object]:
    return {
        "version": 1,
        "namespace": run.namespace,
        "output": output,
        "kind": kind,
        "bytes": written,
        "launches": run.story.launches,
        "saves": len(run.story.saves),
        "failures": len(run.ledger.failures),
        "events": len(run.reading.events),
        "bad_lines": run.reading.bad_lines,
        "remarks": remarks(run),
        "errors": {
            name: {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
            for name, error in run.errors.items()
        },
    }
