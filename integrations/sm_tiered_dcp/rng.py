"""The state of the random generators, as plain values that load without a pickle being executed."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Mapping
from typing import Any, cast

import torch

from sm_tiered.errors import MismatchError

__all__ = ["RngState"]


class RngState:
    """Python's, NumPy's, torch's CPU and CUDA generators. Belongs under ``per_rank``: ranks draw different numbers.

    NumPy's is saved if NumPy is loaded, CUDA's if CUDA is initialised: those of all devices that the process sees.
    """

    def state_dict(self) -> dict[str, Any]:
        """Return the generators' state; draws nothing and initialises nothing."""
        found: dict[str, Any] = {"python": random.getstate(), "torch": _to_bytes(torch.get_rng_state())}
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            kind, keys, *rest = numpy.random.get_state()
            found["numpy"] = (str(kind), keys.tobytes(), int(rest[0]), int(rest[1]), float(rest[2]))
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            found["cuda"] = tuple(_to_bytes(state) for state in torch.cuda.get_rng_state_all())
        return found

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Set the generators that *state_dict* has.

        Raises:
            MismatchError: NumPy's state was saved and NumPy is not installed.
        """
        random.setstate(state_dict["python"])
        torch.set_rng_state(_to_tensor(state_dict["torch"]))
        if "numpy" in state_dict:
            kind, keys, *rest = state_dict["numpy"]
            try:
                numpy: Any = importlib.import_module("numpy")
            except ImportError as error:
                raise MismatchError("NumPy's random state was saved, NumPy is missing", hint="Install numpy") from error
            numpy.random.set_state((kind, numpy.frombuffer(keys, dtype=numpy.uint32), *rest))
        # A rank may see more or fewer devices than when it saved: those that it sees now are set.
        devices = torch.cuda.device_count() if "cuda" in state_dict and torch.cuda.is_available() else 0
        for device, state in zip(range(devices), state_dict.get("cuda", ()), strict=False):
            torch.cuda.set_rng_state(_to_tensor(state), device)


def _to_bytes(state: torch.Tensor) -> bytes:
    return cast("Any", state).numpy().tobytes()


def _to_tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
