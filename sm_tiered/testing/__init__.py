"""The kit that tests sm_tiered's own tiers, for those of third parties too.

- `contract.TierContract`: the tests that every tier and every wrapper passes; subclass it and give it a tier.
- `faults.FaultyTier`: a tier that fails, lies or loses answers, call by call.
- `proxy.FaultProxy`: an HTTP proxy in front of an S3 endpoint that does so request by request.
- `sink`: an S3 server that throws part bodies away, for measuring clients.
- `daemon.StandInDaemon`: a stand-in for the HyperPod in-memory checkpoint service, with faults, for laptops too.
"""

from __future__ import annotations
