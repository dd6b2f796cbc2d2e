"""Training checkpoints in tiers: one copy into memory, drained to durable storage, restored from what verifies.

The core knows bytes, steps and ranks; tensors are the business of `sm_tiered_dcp`, which is where most users begin.
Importing this loads nothing heavy. A tour, from the outside in:

* `sm_tiered.recipe` reads the YAML; `sm_tiered.settings` and `sm_tiered.policies` are what it becomes.
* `sm_tiered.store` opens tiers and attempts; `sm_tiered.saving` saves, `sm_tiered.restore` restores.
* `sm_tiered.drainer` is the process of its own that promotes from memory; `sm_tiered.commit` and
  `sm_tiered.retention` decide what becomes visible on a durable tier and what goes.
* `sm_tiered.tiers` are the places: `memory`, `local`, `s3`, behind the contract in `sm_tiered.tiers.base`.
* `sm_tiered.layout` names every key, `sm_tiered.records` and `sm_tiered.manifest` say what stands in them.
* `sm_tiered.errors` draws the tree of all errors; `sm_tiered.events` lists what is told to the logger ``sm_tiered``.
* `sm_tiered.testing` is for your own tests: the contract suite for a new tier, fault wrappers, an S3 fault proxy.
"""

from __future__ import annotations

from sm_tiered.errors import TieredError

__all__ = ["TieredError", "__version__"]

__version__ = "0.1.0"
