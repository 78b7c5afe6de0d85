"""The console command `rollout`: every sub-command imports what it needs only when it runs."""

from __future__ import annotations


def main() -> None:
    """Run the console command; the one entry point of `[project.scripts]`."""
    from .app import run

    run()
