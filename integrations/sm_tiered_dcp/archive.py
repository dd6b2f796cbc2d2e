"""A whole object as one stock ``torch.save`` file, for readers that know nothing of us, written with one copy.

``torch.save`` is asked for everything but the tensors' data; that is copied from the tensors to where it belongs in the
file. The pickle is padded, so that its length, and with it the place of every tensor, stays the same from save to save:
then only the pickle is made anew.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from sm_tiered.errors import TieredError
from sm_tiered_dcp.archive_pickles import MovedError, Pickled, PickleModule, pickle_again
from sm_tiered_dcp.frames import Frame, framed
from sm_tiered_dcp.proofs import blamed, loads_safely, pickles

__all__ = ["Archive", "Packed", "Packer"]

_GLOBAL = re.compile(rb"c([\w.\x80-\xff]+)\n([\w.\x80-\xff]+)\n")
"""How a pickle of protocol 2 names what it needs; text that only looks so does no harm."""

_proven: set[tuple[bytes, bytes]] = set()
"""What pickles named that ``torch.load(weights_only=True)`` has read."""


class Archive:
    """A leaf of a state: *value* is stored whole, as one file that ``torch.load`` reads, and comes back as one.

    For what another program shall find as its own file; its tensors can't be resharded. Rank 0's is stored and comes
    back on every rank; in the memory of each further node one rank keeps its own. So hold the same on all ranks.
    """

    def __init__(self, value: Any = None) -> None:
        """Hold *value*; None where it is to be restored."""
        self.value = value


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A file about to be written: all but the tensors' data, and the tensors, live."""

    frame: Frame
    tensors: tuple[torch.Tensor, ...] = field(repr=False)
    """One for each hole of the frame, in its order."""


class _Last(NamedTuple):
    """What the last save made."""

    frame: Frame
    pickled: Pickled
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

        Tensors are stored on the CPU, views at their own size; what is one tensor stays one.

        Raises:
            UnsafeValueError: something inside could only be stored by a pickle that runs code (where that is allowed:
                not even so). The message names the place.
            StructureError: a tensor reaches beyond its storage.
        """
        try:
            return self._again(value) or self._anew(value)
        except TieredError:
            raise
        except Exception as error:
            raise blamed(value, self._path, pickles, f"can't be stored: {error}", "Remove it.") from error

    def _again(self, value: object) -> Packed | None:
        """The quick way, as long as the tensors stand where they stood: around a new pickle all is as it was."""
        last = self._last
        if last is None:
            return None
        try:
            pickled = pickle_again(value, last.pickled.entries)
        except MovedError:
            return None
        if len(pickled.data) != len(last.pickled.data) or pickled.tensors.keys() != last.records:
            return None
        self._prove(value, pickled.data)
        (_, first), *rest = last.frame.pieces
        first = first.replace(last.pickled.data, pickled.data)
        return self._packed(replace(last.frame, pieces=((0, first), *rest)), pickled)

    def _anew(self, value: object) -> Packed:
        self._last, module = None, PickleModule(self._path)
        frame, pickled = framed(value, pickle_module=module), module.pickled
        if frame is None or frame.pieces[0][1].count(pickled.data) != 1:
            self._prove(value, None)
            return _plainly_packed(value)
        self._prove(value, pickled.data)
        return self._packed(frame, pickled)

    def _packed(self, frame: Frame, pickled: Pickled) -> Packed:
        tensors = tuple(pickled.tensors[hole.record] for hole in frame.holes)
        self._last = _Last(frame, pickled, frozenset(pickled.tensors))
        pickled.tensors.clear()  # what the training lets go of after a save shall be free
        return Packed(frame=frame, tensors=tensors)

    def _prove(self, value: object, pickled: bytes | None) -> None:
        """See that *value* loads without a pickle that runs code; once for all whose pickles name the same things."""
        named = frozenset(_GLOBAL.findall(pickled)) if pickled is not None else None
        if self._allow_pickle or (named is not None and named <= _proven):
            return
        if not loads_safely(value):
            hint = "Remove it or set allow_pickle: true."
            raise blamed(value, self._path, loads_safely, "can't be stored safely", hint)
        _proven.update(named or ())


def _plainly_packed(value: object) -> Packed:
    """For a torch that does not seek over data: a second copy of it, in the frame."""
    stream = io.BytesIO()
    torch.save(value, stream)
    data = stream.getvalue()
    return Packed(frame=Frame(size=len(data), pieces=((0, data),), holes=()), tensors=())
