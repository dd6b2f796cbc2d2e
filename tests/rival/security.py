"""Defects 19 to 21: what others can do to a job, and what a wrong value does."""

from __future__ import annotations

import pickle
import urllib.request
from pathlib import Path
from typing import Any

from sm_tiered.testing.daemon import shard_meta
from tests.rival.rig import Rig
from tests.rival.sides import LOST, Library, Loaded, Side, library, load, save, state_of


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.path),)


def hostile_metadata(rig: Rig) -> str:
    """d04: somebody in the cluster's network posts a pickle over what a job has put to the service."""
    side, ran = rig.side(), rig.tmp / "ran"
    rig.save(side, {10: (1.0, False)})
    rig.lose_node()
    body = pickle.dumps(Hostile(str(ran)))
    for name, kept in list(rig.daemon.namespaces.items()):
        for rank, steps in kept.steps.items():
            for step in steps:
                url = f"{rig.daemon.url}/v1/cp/checkpoints/{name}/{rank}/{step}"
                request = urllib.request.Request(url, body, {"Shard-Meta": shard_meta(body)}, method="POST")
                urllib.request.urlopen(request).close()
    (loaded,) = rig.load(side)
    assert loaded.error
    return "the payload runs" if ran.exists() else "refused, nothing runs"


def _save_hostile(rank: int, side: Side, path: str) -> str:
    lib = library(side)
    try:
        save(lib, lib.configure(), 10, state_of(1.0, extra=Hostile(path)))
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _load_hostile(rank: int, side: Side) -> Loaded:
    lib = library(side)
    return load(lib, lib.configure(), state_of(LOST, extra=None))


def hostile_object(rig: Rig) -> str:
    """d04b: a value in the state that runs code when it is unpickled."""
    side, ran = rig.side(), rig.tmp / "ran"
    (refused,) = rig.run(side, _save_hostile, str(ran))
    if refused:
        assert "extra" in refused, refused
        return "refused when it is saved"
    rig.run(side, _load_hostile)
    return "the payload runs" if ran.exists() else "nothing runs"


def _save_with_name(rank: int, side: Side) -> str:
    lib = library(side)
    try:
        save(lib, lib.configure(), 10, state_of(1.0))
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return ""


def hostile_namespace(rig: Rig) -> str:
    """d17: a namespace that spells the service's reset, and one that spells another directory."""
    rig.save(rig.side(), {10: (1.0, False)})
    kept = dict(rig.daemon.namespaces)
    assert kept
    refused = [
        *rig.run(rig.side(namespace="../cluster/reset?"), _save_with_name),
        *rig.run(rig.side(namespace="../../elsewhere/x"), _save_with_name),
    ]
    wiped = not set(kept) <= set(rig.daemon.namespaces)
    wrote = list(rig.tmp.rglob("elsewhere/*"))
    if not wiped and not wrote:
        assert all("namespace" in text for text in refused), refused
        return "refused"
    said = "fails" if refused[0] else "succeeds"
    memory, file = "all jobs' memory wiped" if wiped else "nothing wiped", "a" if wrote else "no"
    return f"the save {said}, {memory}, {file} file written elsewhere"


BAD: dict[str, dict[str, Any]] = {
    "namespace with a newline": {"namespace": "job\n[INFO] all is well"},
    "namespace=5": {"namespace": 5},
    "world_size=True": {"world_size": True},
    "world_size=2.5": {"world_size": 2.5},
    "world_size='2'": {"world_size": "2"},
    "save_to_disk=True": {"save_to_disk": True},
    "step=1.5": {"step": 1.5},
    "step=True": {"step": True},
    "step='7'": {"step": "7"},
    "step=None": {"step": None},
}


def _try(lib: Library, given: dict[str, Any]) -> str:
    facts = dict(given)
    step = facts.pop("step", 1)
    try:
        lib.writer(checkpoint_config=lib.configure(**facts), step=step)
    except Exception as error:
        named = "world_size" if "world_size" in given else next(iter(given))
        return "told" if type(error) is not TypeError and named in str(error) else f"bare {type(error).__name__}"
    return "accepted"


def _try_all(rank: int, side: Side) -> dict[str, str]:
    lib = library(side)
    return {name: _try(lib, given) for name, given in BAD.items()}


def bad_values(rig: Rig) -> str:
    """d22: ten values that can't be meant."""
    (told,) = rig.run(rig.side(), _try_all)
    answers = list(told.values())
    bare = sum(answer.startswith("bare") for answer in answers)
    return f"{answers.count('accepted')} of {len(BAD)} accepted, {bare} bare TypeErrors"
