"""The same small runs as the model's tests."""

from tests.model.conftest import make_run

__all__ = ["make_run"]
