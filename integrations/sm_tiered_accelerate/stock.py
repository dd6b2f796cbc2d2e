"""Accelerate's own saving and loading, between the files of a checkpoint and what was prepared."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator  # pyright: ignore[reportMissingTypeStubs]

from sm_tiered.errors import ConfigError
from sm_tiered.file_loader import Get
from sm_tiered.records import Attempt
from sm_tiered_accelerate import facts, loaders
from sm_tiered_accelerate.capture import catching, own_files, whose
from sm_tiered_accelerate.loaders import Loaders
from sm_tiered_dcp.files import BytesFile, FileSet
from sm_tiered_dcp.tiered_files import TieredFiles

__all__ = ["Stock"]


class Stock:
    """The methods that an Accelerator has of its own, and how to use them for the tiers."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator, self.loaders = accelerator, Loaders(accelerator)
        methods = cast(Any, accelerator)
        self.save: Callable[..., Path] = methods.save_state
        self.load: Callable[..., None] = methods.load_state

    def take(self, files: TieredFiles, safe_serialization: bool, options: Mapping[str, Any]) -> FileSet:
        """Let Accelerate save, and return what it would have written. It counts that as one of its saves.

        Raises:
            ConfigError: nothing was prepared yet.
        """
        self._check_prepared("save")
        self.loaders.watch()
        accelerator, config = self._accelerator, self._accelerator.project_configuration
        automatic = config.automatic_checkpoint_naming
        with contextlib.ExitStack() as stack:
            directory = stack.enter_context(files.staging())
            config.automatic_checkpoint_naming = False  # it would name, and delete, directories of its own
            try:
                with catching(directory, accelerator.distributed_type) as caught:
                    self.save(str(directory), safe_serialization, **options)
            finally:
                config.automatic_checkpoint_naming = automatic
            caught[facts.FILE] = BytesFile(facts.to_json(accelerator))
            (directory / loaders.FILE).write_bytes(self.loaders.to_bytes())
            return FileSet(own=own_files(directory, files.rank), shared=caught, release=stack.pop_all().close)

    def restore(
        self,
        files: TieredFiles,
        step: int | None,
        attempt: Attempt | None,
        load_kwargs: dict[str, Any] | None,
        options: Mapping[str, Any],
    ) -> int | None:
        """Let Accelerate load the newest checkpoint, or *step*; return its step, None when nothing was ever saved.

        With *attempt* another one's is refused.

        Raises: see `TieredAccelerator.restore`.
        """
        self._check_prepared("restore")
        self.loaders.watch()
        stored: dict[str, Any] = {}

        def inspect(get: Get) -> None:
            stored.update(facts.read(get))
            facts.check(stored, self._accelerator)

        def use(directory: Path) -> None:
            self.load(str(directory), load_kwargs, **options)
            self.loaders.restore((directory / loaders.FILE).read_bytes())

        found = files.restore(use, step, inspect=inspect, first=(facts.FILE,), whose=whose, attempt=attempt)
        if found is not None:
            self._accelerator.project_configuration.iteration = int(stored["iteration"])
        return found

    def _check_prepared(self, what: str) -> None:
        private = cast(Any, self._accelerator)
        if not (private._models or private._optimizers or private._custom_objects):
            raise ConfigError(
                f"there is nothing to {what}: the Accelerator has prepared nothing",
                hint="Call accelerator.prepare(model, optimizer, …) first.",
            )
