"""A whole object as one stock ``torch.save`` file, for readers that know nothing of us, written with one copy.

``torch.save`` is asked for everything but the tensors' data; that is copied from the tensors to where it belongs in the
file. The pickle is padded, so that its length, and with it the place of every tensor, stays the same from save to save:
then only the pickle is made anew.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch

from sm_tiered.errors import TieredError, UnsafeValueError
from sm_tiered_dcp.archive_pickles import Entry, MovedError, Pickled, PickleModule, pickle_again
from sm_tiered_dcp.frames import Frame, framed
from sm_tiered_dcp.proofs import blamed, loads_safely, pickles

__all__ = ["Packed", "Packer"]

_proven: dict[object, set[object]] = {}
"""What pickles named that ``torch.load(weights_only=True)`` has read, for what the user allows it to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A file about to be written: all but the tensors' data, and the tensors, live."""

    frame: Frame
    tensors: tuple[torch.Tensor, ...] = field(repr=False)
    """One for each hole of the frame, in its order."""


class _Last(NamedTuple):
    """What the last save made."""

    frame: Frame
    data: bytes
    """The pickle in it."""
    entries: dict[object, Entry]
    records: frozenset[str]
    """Those that the pickle names."""


class Packer:
    """Packs one archive, save after save."""

    def __init__(self, path: str, *, allow_pickle: bool) -> None:
        """Name it *path* in errors; with *allow_pickle* also take what only a pickle that runs code can store."""
        self._path, self._allow_pickle = path, allow_pickle
        self._last: _Last | None = None

    def pack(self, value: object) -> Packed:
        """Return *value* ready to be written. Nothing is copied yet.

        Plain tensors are stored on the CPU, views at their own size; what is one tensor stays one.

        Raises:
            UnsafeValueError: something inside could only be stored by a pickle that runs code (where that is allowed:
                not even so). The message names the place.
            StructureError: a tensor reaches beyond its storage.
        """
        try:
            return self._again(value) or self._anew(value)
        except TieredError:
            raise
        except RecursionError as error:
            raise UnsafeValueError(f"{self._path}: nested too deeply to be stored", hint="Flatten it.") from error
        except Exception as error:
            raise blamed(value, self._path, pickles, f"can't be stored: {error}", "Remove it.") from error

    def _again(self, value: object) -> Packed | None:
        """The quick way, as long as the tensors stand where they stood: around a new pickle all is as it was."""
        last = self._last
        if last is None:
            return None
        try:
            pickled = pickle_again(value, last.entries)
        except MovedError:
            return None
        if len(pickled.data) != len(last.data) or pickled.tensors.keys() != last.records:
            return None
        self._prove(value, pickled.named)
        (_, first), *rest = last.frame.pieces
        first = first.replace(last.data, pickled.data)
        return self._packed(replace(last.frame, pieces=((0, first), *rest)), pickled)

    def _anew(self, value: object) -> Packed:
        self._last, module = None, PickleModule(self._path)
        try:
            frame = _framed(value, module)
            pickled = module.pickled
            if frame is None or frame.pieces[0][1].count(pickled.data) != 1:
                packed = _plainly_packed(value)
                self._prove(value, None)
                return packed
            self._prove(value, pickled.named)
            return self._packed(frame, pickled)
        finally:
            module.forget()

    def _packed(self, frame: Frame, pickled: Pickled) -> Packed:
        self._last = _Last(frame, pickled.data, pickled.entries, frozenset(pickled.tensors))
        return Packed(frame=frame, tensors=tuple(pickled.tensors[hole.record] for hole in frame.holes))

    def _prove(self, value: object, named: set[object] | None) -> None:
        """See that *value* loads without a pickle that runs code; once for all whose pickles name the same things."""
        allowed = frozenset(map(str, cast("Any", torch.serialization).get_safe_globals()))
        known = _proven.setdefault(allowed, set())
        if self._allow_pickle or (named is not None and named <= known):
            return
        if not loads_safely(value):
            hint = "Remove it or set allow_pickle: true."
            raise blamed(value, self._path, loads_safely, "can't be stored safely", hint)
        known.update(named or ())


def _framed(value: object, module: PickleModule) -> Frame | None:
    try:
        return framed(value, pickle_module=module)
    except (TieredError, RecursionError):
        raise
    except Exception:  # noqa: BLE001 - what torch can't do without the data, it may do with it, or tells of again
        return None


def _plainly_packed(value: object) -> Packed:
    """For a torch that does not seek over data: a second copy of it, in the frame."""
    stream = io.BytesIO()
    torch.save(value, stream)
    data = stream.getvalue()
    return Packed(frame=Frame(size=len(data), pieces=((0, data),), holes=()), tensors=())
