"""What the predecessor does wrong, done by ours: every reproduced defect, with the figure of either side."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from sm_tiered.testing.daemon import StandInDaemon
from sm_tiered.testing.proxy import FaultProxy
from tests.predecessor import predecessor
from tests.rival.defects import DEFECTS, Defect, row, table
from tests.rival.rig import Rig

if TYPE_CHECKING:
    from mypy_boto3_s3.client import S3Client


@pytest.fixture
def make_rig(s3_endpoint: str, s3_client: S3Client, tmp_path: Path, memory_dir: Path) -> Iterator[Callable[..., Rig]]:
    with StandInDaemon() as daemon, FaultProxy(s3_endpoint) as proxy:
        yield lambda source: Rig(daemon, proxy, s3_client, source, tmp_path, memory_dir)


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.id)
def test_ours(defect: Defect, make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(None)
    assert defect.show(rig) == defect.ours
    rig.end_drainer()


def test_the_readme_has_the_table() -> None:
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    between = re.search(r"<!-- defects -->\n(.*?)\n<!-- /defects -->", text, re.DOTALL)
    assert between is not None, "no table between <!-- defects --> and <!-- /defects -->"
    assert between[1] == table().strip()


@pytest.mark.long
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.id)
def test_theirs(defect: Defect, make_rig: Callable[..., Rig], capsys: pytest.CaptureFixture[str]) -> None:
    """It prints the row; a figure that is another one than here means that the predecessor has changed."""
    found = defect.show(make_rig(str(predecessor())))
    with capsys.disabled():
        sys.stdout.write(f"\n{row(defect.what, found, defect.ours)}\n")
    assert found == defect.theirs
