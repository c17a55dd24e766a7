"""Where the checkout and its tests lie, for tests that start programs from there."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
