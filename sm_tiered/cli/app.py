"""The command line's entry: what can be said there. Each command is loaded when it is called."""

from __future__ import annotations

from sm_tiered.cli import acts, looks, pictures, recipes
from sm_tiered.cli.common import fail_softly
from sm_tiered.cli.root import app

__all__ = ["acts", "app", "looks", "main", "pictures", "recipes"]


def main() -> None:
    """Run the command that the arguments name."""
    fail_softly()
    app(prog_name="sm-tiered")


if __name__ == "__main__":
    main()
