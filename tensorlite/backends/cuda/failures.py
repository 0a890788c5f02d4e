"""Errors of CUDA and its libraries in a sentence: their own words are a name and a number."""

import re

LIBRARIES = ("cupy", "cupy_backends", "nvmath", "cuda")  # whose exceptions these are
INSTALL = "python -m tensorlite.doctor says what to install"
REMEDIES = {  # the first whose pattern is in the error's name and words
    r"headers|open source|(to|ure) find|not ?found|no_?(binary|kernel)|gpu-arch|arch_mismatch|_?ptx": INSTALL,
    r"insufficient_?driver|driver_?mismatch": "update the NVIDIA driver",
    r"alloc|out_?of_?memory|not_initialized": "end what else uses the GPU's memory (nvidia-smi lists it), or lower "
    "--batch-size",
    r"timeout": "this GPU also draws a screen, for which what takes long is ended: lower --batch-size",
    r"ecc|unavailable|lost|hardware|unknown": "look what nvidia-smi says, and restart the machine if the GPU is gone",
    r"illegal|invalid|misaligned|launch_?fail|execution_failed|assert|capture": "this should not happen, so please "
    "report it; --no-graph or --backend numpy may get round it",
    "": "python -m tensorlite.doctor examines this machine, and --backend numpy needs no GPU",
}


def explain_failure(error: BaseException | None, machine: str) -> str | None:
    """What failed, on which machine, and what to do; None if no error of theirs led to this one."""
    first = None
    while error is not None:  # one may have come of another: of a device that has failed, all else fails as well
        if _is_of_libraries(error) and (first is None or type(error).__name__ != "NVRTCError"):  # which has no words
            first = error
        error = error.__cause__ or error.__context__
    if first is None:
        return None
    lines = [line.strip() for line in str(first).splitlines() if line.strip()]
    what = ": ".join([type(first).__name__, *lines[:1]])
    remedy = next(remedy for pattern, remedy in REMEDIES.items() if re.search(pattern, what, re.IGNORECASE))
    return f"the GPU failed with {what} ({machine}): {remedy}"


def _is_of_libraries(error: BaseException) -> bool:
    if type(error).__module__.partition(".")[0] in LIBRARIES:
        return not isinstance(error, MemoryError)
    return isinstance(error, RuntimeError) and "CUDA headers" in str(error)  # which CuPy has no class for
