"""Checkpoints that amzn-sagemaker-checkpointing wrote, as checkpoints of ours.

Nothing of them is believed: the metadata is read as data, every stored value is checked before it is loaded, and
nothing is unpickled that ``torch.load(weights_only=True)`` refuses, unless that was asked for.
"""

from __future__ import annotations

from sm_tiered_dcp.predecessor.adopting import adopt, too_late
from sm_tiered_dcp.predecessor.importing import OLDER, REFUSALS, import_step
from sm_tiered_dcp.predecessor.looking import Imported, doubt_about, look_at, read_whole
from sm_tiered_dcp.predecessor.origins import open_origin
from sm_tiered_dcp.predecessor.sources import Listed, Source, TierSource

__all__ = [
    "OLDER",
    "REFUSALS",
    "Imported",
    "Listed",
    "Source",
    "TierSource",
    "adopt",
    "doubt_about",
    "import_step",
    "look_at",
    "open_origin",
    "read_whole",
    "too_late",
]
