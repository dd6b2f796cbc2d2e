"""The table: every reproduced defect of the predecessor, how it is shown, and what either side does."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from tests.predecessor import NEWEST
from tests.rival import costs, lost_recovery, security, wrong_results
from tests.rival.rig import Rig

__all__ = ["DEFECTS", "Defect", "row", "table"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Defect:
    """One row."""

    id: str
    what: str
    show: Callable[[Rig], str]
    theirs: str
    """What amzn-sagemaker-checkpointing 1.1.3 does, as `show` tells it."""
    ours: str


DEFECTS = (
    Defect(
        id="d01",
        what="an object in S3 is cut where one of its tensors ends",
        show=wrong_results.truncated_object,
        theirs="loads, w2, w3 not as saved",
        ours="refused",
    ),
    Defect(
        id="d02",
        what="the service answers 200 with nothing in it",
        show=wrong_results.empty_answer,
        theirs="loads, w not as saved",
        ours="refused",
    ),
    Defect(
        id="d03",
        what="one bit of an object in S3 flips, 50 times",
        show=wrong_results.flipped_bits,
        theirs="50 of 50 loaded in silence",
        ours="0 of 50 loaded in silence",
    ),
    Defect(
        id="d11",
        what="one request of rank 1 for the newest step fails",
        show=wrong_results.ranks_disagree,
        theirs="ranks hold steps 200 and 100",
        ours="ranks hold steps 200 and 200",
    ),
    Defect(
        id="d12",
        what="a run that saves step 10 again dies between two shards",
        show=wrong_results.overwritten_in_place,
        theirs="loads [2.0] on rank 0, [1.0] on rank 1",
        ours="loads [1.0] on rank 0, [1.0] on rank 1",
    ),
    Defect(
        id="d13",
        what="step 10 of one run in S3, of the next in memory; a shard is lost",
        show=wrong_results.mixed_attempts,
        theirs="saved 2.0, loads 1.0",
        ours="saved 2.0, loads 2.0",
    ),
    Defect(
        id="d10",
        what="world_size=1, as its docstring says, with two processes",
        show=wrong_results.wrong_world,
        theirs="rank 1: loads, b_tp not as saved",
        ours="refused when it is configured",
    ),
    Defect(
        id="d18",
        what="a writer and a reader are used twice",
        show=wrong_results.reused_writer,
        theirs="step 10 holds 20.0, the latest is 20.0",
        ours="step 10 holds 10.0, the latest is 30.0",
    ),
    Defect(
        id="d20",
        what="step 110 is saved after going back from 300 to 100",
        show=wrong_results.lost_after_rollback,
        theirs="loads step 300",
        ours="loads step 110",
    ),
    Defect(
        id="d05b",
        what="a step that was never saved, with allow_partial_load",
        show=wrong_results.nothing_is_loaded,
        theirs="load returns, w = -1.0",
        ours="refused",
    ),
    Defect(
        id="d07",
        what="the commit of step 300 is throttled once, memory is lost",
        show=lost_recovery.one_429_at_the_commit,
        theirs="nothing is loaded",
        ours="loads step 300",
    ),
    Defect(
        id="d08b",
        what="the documented loop, S3 slower than a step, memory is lost",
        show=lost_recovery.slow_s3_in_the_loop,
        theirs="0 saves failed, nothing is loaded",
        ours="0 saves failed, loads step 50",
    ),
    Defect(
        id="d08",
        what="the documented loop, the service slower than a step",
        show=lost_recovery.slow_service_in_the_loop,
        theirs="S3 has steps [40], it was to be [50]",
        ours="S3 has steps [50], it was to be [50]",
    ),
    Defect(
        id="d06",
        what="a shard of the newest of three steps is lost",
        show=lost_recovery.lost_shard,
        theirs="nothing is loaded",
        ours="loads step 150",
    ),
    Defect(
        id="d09",
        what="saved by 2 ranks in memory, loaded by 1 and by 3",
        show=lost_recovery.resized_in_memory,
        theirs="2→1 fails, 2→3 fails",
        ours="2→1 loads, 2→3 loads",
    ),
    Defect(
        id="d09b",
        what="the same with S3 besides, and with S3 alone",
        show=lost_recovery.resized_from_s3,
        theirs="2→1 fails, 2→3 loads; from S3 alone 2→1 loads, 2→3 fails",
        ours="2→1 loads, 2→3 loads; from S3 alone 2→1 loads, 2→3 loads",
    ),
    Defect(
        id="d14",
        what="only step 0 was saved, memory is lost",
        show=lost_recovery.step_zero,
        theirs="nothing is loaded",
        ours="loads step 0",
    ),
    Defect(
        id="d19",
        what="one GET of a load from S3 is throttled",
        show=lost_recovery.one_429_on_load,
        theirs="nothing is loaded",
        ours="loads step 100",
    ),
    Defect(
        id="d15",
        what="S3 is down, the save goes to memory only",
        show=lost_recovery.s3_is_down,
        theirs="the save fails",
        ours="saved, loads step 1",
    ),
    Defect(
        id="d24",
        what="one request to the service loses its connection",
        show=lost_recovery.dropped_request,
        theirs="the save fails",
        ours="saved, loads step 1",
    ),
    Defect(
        id="d04",
        what="somebody posts a pickle over what the service holds",
        show=security.hostile_metadata,
        theirs="the payload runs",
        ours="refused, nothing runs",
    ),
    Defect(
        id="d04b",
        what="a value in the state runs code when unpickled",
        show=security.hostile_object,
        theirs="the payload runs",
        ours="refused when it is saved",
    ),
    Defect(
        id="d17",
        what="namespaces '../cluster/reset?' and '../../elsewhere/x'",
        show=security.hostile_namespace,
        theirs="the save succeeds, all jobs' memory wiped, a file written elsewhere",
        ours="refused",
    ),
    Defect(
        id="d22",
        what="ten values of config and step that can't be meant",
        show=security.bad_values,
        theirs="7 of 10 accepted, 3 bare TypeErrors",
        ours="0 of 10 accepted, 0 bare TypeErrors",
    ),
    Defect(
        id="d16",
        what="20 views of one tensor are saved",
        show=costs.views,
        theirs="20.0 times the data",
        ours="1.0 times the data",
    ),
    Defect(
        id="d21",
        what="40 saves, the last 20 writers still held",
        show=costs.leaked_sockets,
        theirs="19 more sockets after 40 saves",
        ours="0 more sockets after 40 saves",
    ),
    Defect(
        id="d23",
        what="AWS_ENDPOINT_URL_S3 differs from AWS_ENDPOINT_URL",
        show=costs.two_endpoints,
        theirs="the save goes to AWS_ENDPOINT_URL",
        ours="the save goes to AWS_ENDPOINT_URL_S3",
    ),
)


def row(*cells: str) -> str:
    """Return a row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """Return the table of README.md."""
    rows = [row("what happens", f"amzn-sagemaker-checkpointing {NEWEST}", "sm_tiered"), row("---", "---", "---")]
    return "\n".join([*rows, *(row(defect.what, defect.theirs, defect.ours) for defect in DEFECTS)])


if __name__ == "__main__":
    sys.stdout.write(f"{table()}\n")
