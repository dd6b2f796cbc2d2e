"""What `Accelerator.save_state` writes, caught on its way: large values live, for one copy; the rest from a directory.

Accelerate writes models, optimizers, schedulers and custom objects with one function of its own, which is replaced for
the time of the call. Random states, loaders, the scaler, and what FSDP, DeepSpeed, Megatron and hooks write themselves
go to files of a directory in memory, each rank's its own.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from accelerate import checkpointing  # pyright: ignore[reportMissingTypeStubs]
from accelerate import utils as accelerate_utils  # pyright: ignore[reportMissingTypeStubs]
from accelerate.utils import RNG_STATE_NAME, SCALER_NAME, DistributedType  # pyright: ignore[reportMissingTypeStubs]

from sm_tiered import layout
from sm_tiered_accelerate import loaders
from sm_tiered_dcp.files import DiskFile, File, SafetensorsFile, TorchFile

__all__ = ["catching", "own_files", "whose"]

_METADATA = {"format": "pt"}
"""What Accelerate writes into the header of a safetensors file."""
_WRITTEN_BY_ALL = re.compile(rf"dl_state_dict(_\d+)?\.bin|{re.escape(SCALER_NAME)}|{re.escape(loaders.FILE)}")
"""Files that every rank writes under one name, though they differ: on one file system the last writer's is left."""
_RANDOM = re.compile(rf"{re.escape(RNG_STATE_NAME)}_(\d{{1,6}})\.pkl")


@contextmanager
def catching(directory: Path, kind: DistributedType) -> Generator[dict[str, File], None, None]:
    """Within, what Accelerate's own function would write into *directory* is added to what this gives, by name."""
    caught: dict[str, File] = {}
    module = cast(Any, checkpointing)
    stock: Callable[..., None] | None = getattr(module, "save", None)
    if stock is None or kind == DistributedType.XLA:
        yield caught  # another release of Accelerate, or tensors that only it can read: all goes through the directory
        return

    def save(obj: Any, f: Any, save_on_each_node: bool = False, safe_serialization: bool = False) -> None:
        caught[os.path.relpath(f, directory)] = _safetensors(obj) if safe_serialization else TorchFile(obj)

    module.save = save
    try:
        yield caught
    finally:
        module.save = stock


def _safetensors(state: Mapping[str, Any]) -> SafetensorsFile:
    # A copy, because what is tied is taken out of it: the caller's hooks and ours may look at it again.
    if isinstance(state, OrderedDict):
        state = cast(Any, accelerate_utils).clean_state_dict_for_safetensors(OrderedDict(state))
    return SafetensorsFile(state, _METADATA)


def whose(name: str) -> int | None:
    """Return the rank that alone reads the file *name*; None: all do, or it can't be told."""
    found = _RANDOM.fullmatch(name)
    if found is not None:
        return int(found[1])
    return 0 if _WRITTEN_BY_ALL.fullmatch(name) else None


def own_files(directory: Path, rank: int) -> dict[str, File]:
    """Return what *rank* wrote into its *directory*, by name."""
    found: dict[str, File] = {}
    for place, _, names in os.walk(directory):
        for name in names:
            path = Path(place) / name
            relative = path.relative_to(directory).as_posix()
            own = _WRITTEN_BY_ALL.fullmatch(relative) is not None
            found[layout.own_name(rank, relative) if own else relative] = DiskFile(str(path))
    return found
