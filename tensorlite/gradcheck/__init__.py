"""Gradient checks by finite differences, for the ops here and for anyone's own."""

from tensorlite.gradcheck.report import Element, GradcheckError, KinkError, Report, UndecidedWarning


def gradcheck(fn, *inputs, **options) -> bool:
    from tensorlite.gradcheck.compare import check
    report = check(fn, *inputs, **options)
    if report.error:
        raise report.error
    if report.undecided:
        import warnings
        warnings.warn(f"{report.undecided} undecided {report.worst[:2]}", UndecidedWarning, stacklevel=2)
    return True
