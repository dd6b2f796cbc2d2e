"""``sm-tiered timeline``: the page in a real browser, the trace, and text from outside that would be more than text."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sm_tiered.cli.app import app
from tests.browser import WHY_NOT, Browser, Page, browser
from tests.told_runs import NAMESPACE, Teller, as_lines, long_run
from tests.unit.cli_checkpoints import local_tier, memory_tier, write_recipe

needs_browser = [
    pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or ""),
    pytest.mark.xdist_group("browser"),
]
EVIL = "</script><script>document.title='taken'</script><img src=x onerror=document.title='taken'>{{DATA}}<!--&\u2028"


def call(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.output
    return result


def write_events(run: Teller, directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in as_lines(run.done()).items():
        (directory / name).write_bytes(data)
    return directory


def short_run(*, reason: str = "the drain is busy", namespace: str = NAMESPACE) -> Teller:
    """Saves, a drain, one left out and one that failed; both kinds of failure."""
    run = Teller(step_secs=1.0)
    run.start()
    for _ in range(6):
        run.train(10)
        if run.step == 40:
            run.skip(reason)
        run.save(blocked=0.5, ack=0.5, drain=12.0 if run.step in (20, 60) else None)
    run.train(5)
    run.kill(down=25)
    run.start()
    run.train(20)
    run.save(blocked=0.5, drain=4.0)
    run.tell("PromoteFailed", rank=None, at=run.now + 2, step=80, tier="disk", error=reason)
    run.tell("CandidateRefused", step=60, attempt="a000001-1-00000001", reason=reason)
    run.draining.clear()
    run.train(10)
    run.kill(node=True, down=40)
    run.start(node_lost=True, restore_secs=10)
    run.train(15)
    run.end()
    run.events = [replace(event, namespace=namespace) for event in run.events]
    return run


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests of this module."""
    with browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture
def opened(chromium: Browser, tmp_path: Path) -> Callable[..., Page]:
    """Draw a run, and open what came out."""

    def draw(run: Teller, *, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        path = tmp_path / "run.html"
        result = call("timeline", write_events(run, tmp_path / "events"), "-o", path)
        assert result.exit_code == 0, result.output
        page = Page(chromium, width, height, dark=dark)
        page.seconds = page.open(path)  # type: ignore[attr-defined]
        return page

    return draw


def rest(page: Page) -> None:
    """Wait until what was asked for is drawn."""
    frames = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 20))))"
    page.call("Runtime.evaluate", expression=frames, awaitPromise=True)


def place(page: Page, lane: str, share: float) -> tuple[float, float]:
    """Where on the screen a lane is, at a share of its width; no lane: the area below them."""
    page.value("document.getElementById('lanes').scrollIntoView({block: 'center'})")
    left, top, from_x, to_x, middle = page.value(
        "(() => { const box = document.getElementById('lanes').getBoundingClientRect();"
        f" const lane = drawn.lanes.find(one => one.name === {json.dumps(lane)});"
        " return [box.left, box.top, drawn.left, drawn.right, lane ? lane.y + lane.height / 2 : drawn.riskY + 75]; })()"
    )
    return left + from_x + share * (to_x - from_x), top + middle


def tip(page: Page, lane: str, share: float) -> str:
    """What is said where the pointer comes to stand."""
    x, y = place(page, lane, share)
    page.mouse("mouseMoved", x, y)
    rest(page)
    text = page.value("(tip => tip.hidden ? '' : tip.innerText)(document.getElementById('tip'))")
    return text.replace("\xa0", " ")


def share_of(page: Page, time_secs: float) -> float:
    return page.value(f"(drawn.x({time_secs}) - drawn.left) / (drawn.right - drawn.left)")


class TestPage:
    pytestmark = needs_browser

    def test_it_draws_itself_without_a_complaint_and_without_a_network(self, opened: Callable[..., Page]) -> None:
        page = opened(short_run())
        assert page.complaints() == []
        assert [url.partition(":")[0] for url in page.requests()] == ["file"]
        assert page.value("document.getElementById('namespace').textContent") == NAMESPACE
        figures = page.value("document.getElementById('figures').innerText")
        assert "Goodput" in figures
        rows = page.value("[...document.querySelectorAll('#failures tbody tr')].map(row => row.innerText)")
        assert len(rows) == 2
        assert rows[0].startswith("Processes died")
        assert "step 65" in rows[0]
        assert rows[1].startswith("Node lost")

    def test_every_lane_has_its_colours_on_the_canvas(self, opened: Callable[..., Page]) -> None:
        page = opened(short_run())
        seen = page.value(
            "(() => { const canvas = document.getElementById('lanes'), count = {}, colours = palette();"
            " const data = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;"
            " for (let i = 0; i < data.length; i += 4) {"
            "   const key = data.slice(i, i + 3).join(); count[key] = (count[key] || 0) + 1; }"
            " const rgb = hex => [1, 3, 5].map(i => parseInt(hex.slice(i, i + 2), 16)).join();"
            " const names = ['kept', 'blocked', 'restoring', 'memory', 'drain', 'skipped', 'failed', 'node'];"
            " return Object.fromEntries(names.map(name => [name, count[rgb(colours[name])] || 0])); })()"
        )
        assert all(count > 20 for count in seen.values()), seen

    def test_hovering_tells_of_what_is_there(self, opened: Callable[..., Page]) -> None:
        page = opened(short_run())
        # The save of step 20 ends at 3 + 20 + 2 * 0.5 seconds; its upload takes until 12.5 s later.
        words = tip(page, "disk", share_of(page, 30.0))
        assert words.startswith("Save of step 20")
        assert "blocked for\n0.50 s" in words
        assert "committed after 12.5 s" in words
        words = tip(page, "disk", share_of(page, 3 + 40 + 4 * 0.5))
        assert words.startswith("Save of step 40")
        assert "left out: the drain is busy" in words
        assert tip(page, "blocked", share_of(page, 3 + 30 + 3 * 0.5 - 0.2)).startswith("Save of step 30")
        assert tip(page, "training", share_of(page, 50.0)).startswith("Training\n")
        risk = tip(page, "", share_of(page, 3 + 20 + 1.0 + 6.0))
        assert risk.startswith("Work at risk")
        assert re.search(r"if the processes died\n[67]\.\d+ s", risk)
        assert re.search(r"if the node were lost\n2[67]\.\d s", risk)
        page.mouse("mouseMoved", 5, 5)
        rest(page)
        assert page.value("document.getElementById('tip').hidden")
        assert page.complaints() == []

    def test_zooming_panning_and_the_axis_of_steps(self, opened: Callable[..., Page]) -> None:
        page = opened(short_run())
        whole = page.value("[drawn.from, drawn.to]")
        x, y = place(page, "training", 0.5)
        middle = page.value("drawn.valueAt((drawn.left + drawn.right) / 2)")
        page.mouse("mouseWheel", x, y, deltaX=0, deltaY=-400)
        rest(page)
        near = page.value("[drawn.from, drawn.to]")
        assert near[1] - near[0] < 0.6 * (whole[1] - whole[0])
        assert page.value("drawn.valueAt((drawn.left + drawn.right) / 2)") == pytest.approx(middle, abs=1.0)
        page.mouse("mousePressed", x, y, button="left", buttons=1, clickCount=1)
        page.mouse("mouseMoved", x - 100, y, button="left", buttons=1)
        page.mouse("mouseReleased", x - 100, y, button="left", clickCount=1)
        rest(page)
        assert page.value("drawn.from") > near[0]
        page.value("document.getElementById('fit').click()")
        assert page.value("[drawn.from, drawn.to]") == whole
        page.value("document.getElementById('by-step').click()")
        rest(page)
        assert page.value("document.getElementById('by-step').getAttribute('aria-checked')") == "true"
        low, high = page.value("drawn.extent")
        assert (low, high) == (0, 90)
        assert tip(page, "disk", share_of(page, 22.0)).startswith("Save of step 20")
        page.value("document.getElementById('lanes').focus()")
        for key in ("+", "ArrowRight", "-", "0"):
            page.call("Input.dispatchKeyEvent", type="keyDown", key=key)
        rest(page)
        assert page.value("[drawn.from, drawn.to]") == page.value("drawn.limits")
        assert page.complaints() == []

    @pytest.mark.parametrize("dark", [False, True])
    def test_it_is_light_or_dark_as_the_reader_likes(self, opened: Callable[..., Page], dark: bool) -> None:
        page = opened(short_run(), dark=dark)
        brightness = (
            "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number).reduce((a, b) => a + b)"
        )
        first = page.value(brightness)
        page.value("document.getElementById('theme').click()")
        rest(page)
        second = page.value(brightness)
        assert (first < 200, second < 200) == (dark, not dark)
        assert page.complaints() == []

    @pytest.mark.parametrize("width", [360, 1280])
    def test_nothing_sticks_out_of_a_window(self, opened: Callable[..., Page], width: int) -> None:
        page = opened(short_run(), width=width)
        assert page.value("document.documentElement.scrollWidth") <= width
        x, y = place(page, "training", 0.9)
        page.mouse("mouseMoved", x, y)
        rest(page)
        right = page.value("document.getElementById('tip').getBoundingClientRect().right")
        assert 0 < right <= width

    def test_ten_thousand_saves_stay_quick(self, opened: Callable[..., Page], tmp_path: Path) -> None:
        page = opened(long_run(10_000))
        assert (tmp_path / "run.html").stat().st_size < 3_000_000
        assert page.seconds < 2.0  # type: ignore[attr-defined]
        times = page.value(
            "[1, 2, 3, 4, 5].map(() => { const began = performance.now(); drawn.zoom(0.8); drawn.draw();"
            " return performance.now() - began; })"
        )
        assert sorted(times)[2] < 150, "milliseconds to draw while somebody zooms"
        assert page.complaints() == []

    def test_hostile_text_is_only_text(self, opened: Callable[..., Page]) -> None:
        page = opened(short_run(reason=EVIL, namespace=EVIL))
        assert page.value("document.scripts.length") == 2
        assert page.value("document.images.length") == 0
        assert page.value("document.title") != "taken"
        assert EVIL[:40] in page.value("document.getElementById('namespace').textContent")
        assert "<img src=x" in page.value("document.getElementById('notes').textContent")
        words = tip(page, "disk", share_of(page, 3 + 40 + 4 * 0.5))
        assert "</script><script>" in words
        assert page.complaints() == []


# ---- the file


def data_of(path: Path) -> Any:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), re.DOTALL)
    assert found
    return json.loads(found[1])


def test_the_page_holds_nothing_that_leads_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "run.html"
    assert call("timeline", write_events(short_run(), tmp_path / "events"), "-o", path).exit_code == 0
    text = path.read_text("utf-8")
    assert not re.search(r"https?://|src=|@import|url\(|fetch\(|XMLHttp|import\s*\(", text)
    assert "default-src 'none'" in text
    assert path.stat().st_mode & 0o077 == 0
    found = data_of(path)
    assert found["figures"]["lost_steps"] == 5 + 30
    assert [save[1] for save in found["saves"]] == [10, 20, 30, 40, 50, 60, 80]


def test_hostile_text_can_not_close_the_data(tmp_path: Path) -> None:
    path = tmp_path / "run.html"
    call("timeline", write_events(short_run(reason=EVIL, namespace=EVIL), tmp_path / "events"), "-o", path)
    text = path.read_text("utf-8")
    assert text.count("</script>") == 2
    assert "<img" not in text
    assert "<title>&lt;/script&gt;" in text
    assert EVIL[:60] in data_of(path)["texts"][0]


def test_a_recipe_s_tiers_are_read_together(tmp_path: Path) -> None:
    run = short_run()
    files = as_lines(run.done())
    memory, local = memory_tier(tmp_path / "memory"), local_tier(tmp_path / "local")
    for number, (name, data) in enumerate(files.items()):
        (memory if number % 2 else local).put(f"events/{name}", data)
        local.put(f"events/{name}", data)
    recipe = write_recipe(tmp_path, memory=tmp_path / "memory", local=tmp_path / "local")
    result = call("timeline", recipe, "-o", tmp_path / "run.html", "--json")
    assert result.exit_code == 0
    said = json.loads(result.stdout)
    assert (said["kind"], said["launches"], said["saves"], said["failures"]) == ("page", 3, 7, 2)
    assert said["events"] == len(run.events)
    assert data_of(tmp_path / "run.html")["tiers"][:2] == ["memory", "local"]


@pytest.mark.parametrize("columns", ["80", "120"])
def test_what_was_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    events = write_events(short_run(), tmp_path / "events")
    (events / "rank-00000-1-0000dead.jsonl").write_bytes(b"no event\n")
    result = call("timeline", events, "-o", tmp_path / "run.html")
    assert max(map(len, result.stdout.splitlines())) <= int(columns)
    words = " ".join(result.stdout.split())
    assert "3 launches, 7 saves, 2 failures" in words
    assert "left out, for they are no events: 1 line" in words


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["{events}", "-o", "run.pdf"], 2, "tells no format"),
        (["{events}", "-o", "{missing}/run.html"], 1, "can't be written"),
        (["{missing}.jsonl", "-o", "run.html"], 2, "No such file"),
        (["{empty}", "-o", "run.html"], 2, "holds no files of events"),
        (["a.yaml", "b.yaml", "-o", "run.html"], 2, "2 recipes were given"),
        (["{missing}.yaml", "-o", "run.html"], 2, "recipe not found"),
        (["{two}", "-o", "run.html"], 2, "events of 2 namespaces: other, run-1"),
        (["{drainer}", "-o", "run.html"], 1, "no launch"),
        (["{events}"], 2, "--output"),
    ],
)
def test_what_can_not_be_done_is_said(tmp_path: Path, arguments: list[str], status: int, words: str) -> None:
    places = {name: str(tmp_path / name) for name in ("events", "empty", "two", "drainer", "missing")}
    write_events(short_run(), tmp_path / "events")
    write_events(short_run(), tmp_path / "two")
    write_events(short_run(namespace="other"), tmp_path / "other")
    for path in (tmp_path / "other").iterdir():
        path.rename(tmp_path / "two" / path.name.replace("0000000", "000000a"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "drainer").mkdir()
    name = next(path for path in (tmp_path / "events").iterdir() if path.name.startswith("drainer"))
    (tmp_path / "drainer" / name.name).write_bytes(name.read_bytes())
    result = call("timeline", *(argument.format(**places) for argument in arguments))
    assert result.exit_code == status, result.output
    assert words in " ".join(result.stderr.split())
    assert not list(tmp_path.glob("**/*.html"))


def test_a_run_of_ten_thousand_saves_is_drawn_in_seconds(tmp_path: Path) -> None:
    events = write_events(long_run(10_000), tmp_path / "events")
    began = time.process_time()
    assert call("timeline", events, "-o", tmp_path / "run.html").exit_code == 0
    assert time.process_time() - began < 5.0


# ---- the trace


def test_the_trace_is_what_perfetto_reads(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    assert call("timeline", write_events(short_run(), tmp_path / "events"), "-o", path).exit_code == 0
    trace = json.loads(path.read_text())
    events = trace["traceEvents"]
    assert trace["displayTimeUnit"] in ("ms", "ns")
    required = {"X": {"ts", "dur", "name", "pid", "tid"}, "b": {"ts", "id", "cat", "name"}, "e": {"ts", "id", "cat"}}
    required |= {"i": {"ts", "s", "name"}, "C": {"ts", "args", "name"}, "M": {"name", "args"}}
    for event in events:
        assert required[event["ph"]] <= event.keys(), event
        assert event["ts"] >= 0
    opened: dict[int, float] = {}
    for event in events:
        if event["ph"] == "b":
            opened[event["id"]] = event["ts"]
        elif event["ph"] == "e":
            assert event["ts"] >= opened.pop(event["id"])
    assert opened == {}
    # Slices of one track lie inside of each other or apart: else a reader would drop some.
    for tid in {event["tid"] for event in events if event["ph"] == "X"}:
        slices = sorted((e["ts"], e["dur"]) for e in events if e["ph"] == "X" and e["tid"] == tid)
        for (start, duration), (after, _) in zip(slices, slices[1:], strict=False):
            assert start + duration <= after + 0.2
    names = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {"training", "blocked by saves", "memory", "disk"}
    assert sorted(e["name"] for e in events if e.get("cat") == "failure") == ["failure: node", "failure: process"]
    commits = [e for e in events if e["ph"] == "b" and e["args"]["state"] == "committed"]
    assert [e["args"]["step"] for e in commits] == [20, 60]
