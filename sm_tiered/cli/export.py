"""``sm-tiered export``: a checkpoint's model as safetensors files that other programs load, whatever ranks saved it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sm_tiered.cli.choice import Chosen, Which, chosen
from sm_tiered.cli.common import EXIT_OK, check_step, open_recipe, parallel, threads_for
from sm_tiered.cli.export_target import Target
from sm_tiered.cli.gauge import Gauge
from sm_tiered.cli.output import clean, print_json, rate, render, size, table, text
from sm_tiered.consolidate import FilePlan, batches, index_json, plan_files, untied, write_batch
from sm_tiered.errors import CheckpointNotFoundError, ConfigError, MismatchError
from sm_tiered.selection import is_model, model_prefix, picked
from sm_tiered.stored_chunks import VerifiedChunks
from sm_tiered.stored_files import stored_with_files
from sm_tiered.stored_reads import TensorReader, room_for
from sm_tiered.stored_tensors import Stored, StoredTensor

__all__ = ["Asked", "run"]

_SIZE = re.compile(r"(\d{1,12}(?:\.\d{1,6})?) ?([KMGT]i?B)", re.ASCII)
_UNITS = {f"{unit}B": 1000**power for power, unit in enumerate("KMGT", 1)} | {
    f"{unit}iB": 1024**power for power, unit in enumerate("KMGT", 1)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What was asked for."""

    step: int | None
    tier: str | None
    output: str
    max_shard_size: str
    prefix: str | None
    only: Sequence[str]
    strip: str | None
    every: bool
    force: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Written:
    source: Chosen
    files: Sequence[FilePlan]
    ties: Mapping[str, str]
    left_out: int
    """Tensors that are no model's, and were not asked for."""
    bytes_read: int
    secs: float

    @property
    def names(self) -> list[str]:
        return [name for plan in self.files for name, _, _ in plan.entries]

    @property
    def bytes(self) -> int:
        return sum(plan.size for plan in self.files)


def run(recipe: str, asked: Asked, *, as_json: bool) -> int:
    """Export a checkpoint of *recipe* as *asked*; return the exit status."""
    check_step(asked.step)
    max_bytes = _bytes_of(asked.max_shard_size)
    settings = open_recipe(recipe)
    target = Target(asked.output, force=asked.force)
    with chosen(settings, Which(tier=asked.tier, step=asked.step)) as source:
        written = _export(source, target, asked, max_bytes, quiet=as_json)
    if as_json:
        print_json(_document(written, target))
    else:
        _tell(written, target, asked)
    return EXIT_OK


def _bytes_of(value: str) -> int:
    found = _SIZE.fullmatch(value.strip())
    size_bytes = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size_bytes < 1:
        hint = "A number above 0 and one of KB, MB, GB, TB, KiB, MiB, GiB, TiB, e.g. 5GB."
        raise ConfigError(f"--max-shard-size: {clean(value)[:40]!r} is no size", hint=hint)
    return size_bytes


def _export(source: Chosen, target: Target, asked: Asked, max_bytes: int, *, quiet: bool) -> _Written:
    threads = threads_for(source.settings)
    headers = VerifiedChunks(source.tier, source.checkpoint, source.records, durable=source.durable)
    stored = stored_with_files(source.records, headers)
    wanted = _wanted(stored, asked, source)
    tensors, ties = untied(_renamed(wanted, asked.strip))
    plans = plan_files(tensors, ties, max_bytes)
    chunks = VerifiedChunks(
        source.tier,
        source.checkpoint,
        source.records,
        durable=source.durable,
        room=max(map(room_for, tensors.values())) + threads,
    )
    reader, work = TensorReader(chunks), list(batches(plans))
    label = f"export of {source.label}"
    with (
        target.writing(plans, index_json(plans) if len(plans) > 1 else None) as files,
        Gauge(label, sum(batch.length for batch in work), quiet=quiet) as gauge,
    ):

        def write(place: int) -> None:
            write_batch(work[place], reader, files[work[place].file])
            gauge.add(work[place].length)

        parallel(write, range(len(work)), threads=threads)
        secs = gauge.secs
    return _Written(
        source=source,
        files=plans,
        ties=ties,
        left_out=sum(not is_model(tensor) for name, tensor in stored.tensors.items() if name not in wanted),
        bytes_read=chunks.bytes_read + headers.bytes_read,
        secs=secs,
    )


def _wanted(stored: Stored, asked: Asked, source: Chosen) -> dict[str, StoredTensor]:
    def pick(*, every: bool) -> dict[str, StoredTensor]:
        return picked(stored.tensors, prefix=asked.prefix, patterns=asked.only, every=every)

    found = pick(every=asked.every)
    odd = picked(stored.odd, prefix=asked.prefix, patterns=asked.only, every=asked.every)
    if odd:
        names = ", ".join(list(odd)[:3]) + (" …" if len(odd) > 3 else "")
        message = f"{len(odd)} tensors are stored in another order than row-major, as they were in memory: {names}"
        raise MismatchError(message, hint="Choose others with --only, or load the file with torch.")
    if found:
        return found
    if not stored.tensors:
        files = ", ".join(value.part for value in stored.values.values() if value.is_file)
        raise CheckpointNotFoundError(
            f"{source.label} holds no tensors that can be found without unpickling"
            + (f", only files: {files[:200]}" if files else ""),
            hint="Load it with the program that saved it: its files are stock on every tier.",
        )
    others = len(pick(every=True))
    if others:
        message = f"none of the {others} tensors that were asked for is a model's, by their names"
        raise ConfigError(message, hint="--all exports the others too.")
    names = ", ".join(list(stored.tensors)[:3])
    raise ConfigError("no tensor has such a name", hint=f"There are {len(stored.tensors)}, such as {names}.")


def _renamed(tensors: Mapping[str, StoredTensor], strip: str | None) -> dict[str, StoredTensor]:
    """Return *tensors* by the names that they get."""
    renamed: dict[str, StoredTensor] = {}
    for tensor in tensors.values():
        name = tensor.bare_name.removeprefix(strip or "")
        if not name or name in renamed:
            other = renamed[name].name if name else "nothing"
            raise ConfigError(f"{tensor.name} would be called as {other} is", hint="Change --strip, or use --prefix.")
        renamed[name] = tensor
    if strip and all(name == tensor.bare_name for name, tensor in renamed.items()):
        first = next(iter(renamed))
        raise ConfigError(f"--strip: no name begins with {clean(strip)!r}", hint=f"They are such as {first}.")
    return renamed


# ---- for people


def _tell(written: _Written, target: Target, asked: Asked) -> None:
    rows = table("tensors", "size", "file", right=("tensors", "size"))
    for plan in written.files:
        rows.add_row(text(len(plan.entries)), text(size(plan.size)), text(target.path / plan.name))
    speed = rate(written.bytes, written.secs)
    facts = f"{len(written.names)} tensors, {size(written.bytes)} in {written.secs:.1f} s"
    told = [rows, text("")]
    told += [text(f"{alias} is {kept}: written once", "dim") for alias, kept in list(written.ties.items())[:5]]
    if len(written.ties) > 5:
        told.append(text(f"… and {len(written.ties) - 5} more names that are another's", "dim"))
    if written.left_out:
        told.append(text(f"left out: {written.left_out} tensors that are no model's (--all takes them)", "dim"))
    shared = model_prefix(written.names)
    if shared and asked.strip is None:
        told.append(text(f"all names begin with {shared}: --strip {shared} takes that away", "dim"))
    verdict = f"{written.source.label} exported, every byte verified: {facts}" + (f" ({speed})" if speed else "")
    render(*told, text(verdict, "green"))


# ---- for programs


def _document(written: _Written, target: Target) -> dict[str, object]:
    return {
        "version": 1,
        "checkpoint": written.source.as_json(),
        "directory": str(target.path),
        "files": [
            {"name": plan.name, "bytes": plan.size, "tensors": [name for name, _, _ in plan.entries]}
            for plan in written.files
        ],
        "tied": dict(written.ties),
        "left_out": written.left_out,
        "bytes": written.bytes,
        "bytes_read": written.bytes_read,
        "secs": round(written.secs, 3),
    }
