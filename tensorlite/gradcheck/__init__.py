"""Gradient checks by finite differences, for the ops here and for anyone's own."""

from tensorlite.gradcheck.check import GradcheckError, KinkError, gradcheck

__all__ = ["GradcheckError", "KinkError", "gradcheck"]
