"""The step of a save or a load: named outright, or taken from a path as the predecessor's users write it."""

from __future__ import annotations

import os
import re
from typing import cast

from sm_tiered.errors import ConfigError
from sm_tiered.layout import check_step
from sm_tiered.recipe_fields import shown

__all__ = ["NOT_GIVEN", "step_in", "step_of_load", "step_of_save"]

NOT_GIVEN = -1
"""The predecessor's default for a step."""

_STEP = re.compile(r"(?:^|[/_.-])step_(\d{1,10})(?=/|$)", re.ASCII)


def step_in(path: object) -> int | None:
    """Return the step that *path* names, as ``step_<n>`` at the end of a segment; None where it names none.

    Raises:
        ConfigError: two segments name different ones.
    """
    if not isinstance(path, (str, os.PathLike)):
        return None
    text = str(cast("object", path))
    found = [int(digits) for digits in _STEP.findall(text)]
    if len(set(found)) > 1:
        raise ConfigError(f"path {shown(text)} names several steps: {found}", hint="Pass step=.")
    return found[0] if found else None


def step_of_load(checkpoint_id: object, step: int | None) -> int | None:
    """Return the step that DCP's *checkpoint_id* names: an int, or as in a path. None: it is left to *step*.

    Raises:
        ConfigError: it names none, and there is no *step*: the newest, in its place, is what nobody asked for.
    """
    if checkpoint_id is None:
        return None
    if isinstance(checkpoint_id, int):
        return check_step(checkpoint_id)
    found = step_in(checkpoint_id)
    if found is None and step is None:
        raise ConfigError(
            f"checkpoint_id {shown(checkpoint_id)} names no step",
            hint="Leave it out for the newest; for one step, write checkpoint_id='step_500', or pass step= to the "
            "reader.",
        )
    return found


def step_of_save(path: object, step: object) -> int:
    """Return *step*, or where it is not given (-1, None) the one that *path* names.

    Raises:
        ConfigError: neither names one, or it can't be a step.
    """
    if step is not None and (isinstance(step, bool) or step != NOT_GIVEN):
        return check_step(step)
    if path is not None and not isinstance(path, (str, os.PathLike)):
        raise ConfigError(f"path must be str, got {type(path).__name__}", hint="Write path='step_100/checkpoint'.")
    given = cast("object", path)
    found = step_in(given)
    if found is None:
        raise ConfigError(
            f"Invalid step value: no step is given, and path {shown(given)} names none",
            hint="Pass step=100, or a path such as 'step_100/checkpoint' or '/path/step_42'.",
        )
    return check_step(found)
