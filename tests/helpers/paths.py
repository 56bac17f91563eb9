"""Where what tests use stands in the repository."""

from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
SHIPPED = ROOT / "data" / "model"
