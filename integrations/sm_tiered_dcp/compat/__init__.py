"""The three names of amzn-sagemaker-checkpointing, over our tiers: a training script changes its import lines only.

What its library read and wrote while the training went on is done by `sm_tiered_dcp.writer` and
`sm_tiered_dcp.reader`; this room turns its config into a recipe, and keeps its habits. Its names exist nowhere else.
"""

from __future__ import annotations

from sm_tiered_dcp.compat.config import SageMakerCheckpointConfig
from sm_tiered_dcp.compat.reader import SageMakerTieredStorageReader
from sm_tiered_dcp.compat.writer import SageMakerTieredStorageWriter

__all__ = ["SageMakerCheckpointConfig", "SageMakerTieredStorageReader", "SageMakerTieredStorageWriter"]
