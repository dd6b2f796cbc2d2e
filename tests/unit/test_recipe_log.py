"""``log:`` in a recipe: what it stands for, and what is refused with words that help."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sm_tiered.errors import RecipeError
from sm_tiered.recipe import Recipe
from sm_tiered.settings import LogSettings, Settings

HEAD = "version: 1\nnamespace: run\ntiers: {memory: {kind: memory}}\n"


def settings(text: str) -> Settings:
    return Recipe.parse(HEAD + text).settings()


def test_without_the_key_nothing_is_asked_for() -> None:
    assert settings("").log is None


def test_the_defaults(tmp_path: Path) -> None:
    assert settings("log: {console: true}").log == LogSettings(console=True)
    assert settings(f"log: {{path: {tmp_path}}}").log == LogSettings(path=str(tmp_path))


def test_everything_can_be_set_and_the_drainer_reads_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = settings("log: {console: true, path: ./logs, level: DEBUG, max_size: 1MiB, kept: 9}")
    wanted = LogSettings(console=True, path=str(tmp_path / "logs"), level="DEBUG", max_bytes=2**20, kept=9)
    assert found.log == wanted
    monkeypatch.chdir("/")
    assert Recipe.from_json(found.text).settings().log == wanted


def test_the_environment_can_switch_it(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "log: {console: '${SAY:-true}', path: '${LOGS:-}', level: '${LEVEL:-INFO}'}"
    assert settings(text).log == LogSettings(console=True)
    monkeypatch.setenv("LOGS", "/somewhere")
    monkeypatch.setenv("SAY", "false")
    monkeypatch.setenv("LEVEL", "ERROR")
    assert settings(text).log == LogSettings(path="/somewhere", level="ERROR")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("log: true", ("log", "must be a mapping", "true")),
        ("log: {}", ("log", "asks for nothing", "console: true")),
        ("log: {console: false, level: DEBUG}", ("asks for nothing", "path: ./logs")),
        ("log: {console: 1}", ("log.console", "must be true or false", "1")),
        ("log: {consle: true}", ("log.consle", "unknown key", "Did you mean 'console'?")),
        ("log: {file: run.log}", ("log.file", "unknown key", "path: ./logs", "directory")),
        ("log: {console: true, level: LOUD}", ("log.level", "'DEBUG', 'INFO', 'WARNING' or 'ERROR'", "LOUD")),
        ("log: {path: s3://bucket/logs}", ("log.path", "address")),
        ("log: {path: ''}", ("log.path", "empty")),
        ("log: {path: /x, max_size: 1}", ("log.max_size", "unit missing")),
        ("log: {path: /x, max_size: 1KiB}", ("log.max_size", "4KiB or more")),
        ("log: {path: /x, kept: 0}", ("log.kept", "1 to 1000", "0")),
        ("log: {path: /x, kept: 2.5}", ("log.kept", "must be an integer", "2.5")),
    ],
)
def test_what_is_refused(text: str, words: tuple[Any, ...]) -> None:
    with pytest.raises(RecipeError) as told:
        settings(text)
    message = str(told.value)
    assert "line 4" in message or ":4" in message
    for word in words:
        assert word in message
