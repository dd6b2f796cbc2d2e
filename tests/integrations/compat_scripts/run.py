"""Runs a script of the documentation as it stands, and writes down what it saved and what it loaded.

``run.py SCRIPT FOLDER``: a line for each save and each load, with the step and a digest of the whole state, goes to
``FOLDER/<saved|loaded>-<rank>.jsonl``. What the documentation leaves to its reader is supplied: ``os``, ``time``,
``MyModel``, ``epoch``.
"""

from __future__ import annotations

import hashlib
import json
import os
import runpy
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint

from sm_tiered_dcp.compat import logs

torch.set_num_threads(1)
script, folder = sys.argv[1:]
slow_secs = float(os.environ.get("SAVE_SECS", "0"))
"""How long the training takes from save to save, besides what it takes."""


logs.DIRECTORY = str(Path(folder) / "log")  # a test writes nowhere else


class MyModel(torch.nn.Linear):
    """The reader's own."""

    def __init__(self) -> None:
        super().__init__(100, 10)


def digest(state: Any) -> str:
    found = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Mapping):
            for key in sorted(value, key=str):
                found.update(repr(key).encode())
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for entry in value:
                add(entry)
        else:
            found.update(repr(value).encode())

    add(state)
    return found.hexdigest()


def note(what: str, state: Mapping[str, Any]) -> None:
    rank = os.environ.get("RANK", "0")
    with open(Path(folder) / f"{what}-{rank}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": state["step"], "digest": digest(state)}) + "\n")


real_save, real_load = checkpoint.async_save, checkpoint.load


def async_save(state_dict: Any, **options: Any) -> Any:
    time.sleep(slow_secs)
    note("saved", state_dict)
    begun = time.monotonic()
    future = real_save(state_dict=state_dict, **options)
    took = time.monotonic() - begun
    with open(Path(folder) / "blocked.txt", "a", encoding="utf-8") as file:
        file.write(f"{took:.4f}\n")
    return future


def load(state_dict: Any, **options: Any) -> None:
    real_load(state_dict, **options)
    note("loaded", state_dict)


checkpoint.async_save, checkpoint.load = async_save, load
runpy.run_path(script, {"os": os, "time": time, "MyModel": MyModel, "epoch": 3}, run_name="__main__")
