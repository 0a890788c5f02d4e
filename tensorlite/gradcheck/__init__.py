"""Gradient checks by finite differences, for the ops here and for anyone's own."""

from tensorlite.gradcheck.check import check, gradcheck
from tensorlite.gradcheck.report import Element, GradcheckError, KinkError, Report, UndecidedWarning

__all__ = ["Element", "GradcheckError", "KinkError", "Report", "UndecidedWarning", "check", "gradcheck"]
