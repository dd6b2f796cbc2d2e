"""``sm-tiered schema``: what a recipe may say, as JSON Schema."""

from __future__ import annotations

import json
from pathlib import Path

from sm_tiered.cli.common import EXIT_OK
from sm_tiered.cli.output import clean, print_json, render, text
from sm_tiered.errors import ConfigError, TieredError

__all__ = ["run"]


def run(*, output: str | None, as_json: bool) -> int:
    """Print the schema, or write it to *output*; return the exit status."""
    from sm_tiered.recipe_schema import schema_text

    schema = schema_text()
    if output is None:  # it is a JSON document in any case
        print_json(json.loads(schema))
        return EXIT_OK
    _write(output, schema)
    if as_json:
        print_json({"version": 1, "written": output, "bytes": len(schema.encode())})
    else:
        render(text(f"wrote {output}"))
    return EXIT_OK


def _write(output: str, schema: str) -> None:
    if not output.strip():
        raise ConfigError("--output: is empty", hint="Name a file, e.g. sm_tiered.schema.json.")
    try:
        Path(output).write_text(schema, encoding="utf-8")
    except (OSError, ValueError) as error:
        hint = "Name a file in a directory that can be written to."
        raise TieredError(f"{clean(output)} can't be written: {error}", hint=hint) from error
