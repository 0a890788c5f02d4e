"""The command: python -m tensorlite.doctor"""

import argparse
import subprocess
import sys

import tensorlite
from tensorlite import doctor
from tensorlite.doctor.examine import NOT_HERE

# This very package, and nothing from the current folder, where a cupy.py may lie.
EXAMINE = """import importlib.util, sys
spec = importlib.util.spec_from_file_location("tensorlite", sys.argv[1])
sys.modules["tensorlite"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from tensorlite.doctor.examine import main
sys.exit(main())"""


def main() -> int:
    """0 if --backend cupy works here, 1 if not."""
    argparse.ArgumentParser("python -m tensorlite.doctor", description=doctor.__doc__.partition("\n")[0]).parse_args()
    try:
        status = subprocess.run([sys.executable, "-P", "-c", EXAMINE, tensorlite.__file__]).returncode
    except KeyboardInterrupt:
        return 130
    if status in (0, 1, 130):
        return status
    print(f"{NOT_HERE}: what comes after the last line crashed with exit status {status}; use --backend numpy")
    return 1


if __name__ == "__main__":
    sys.exit(main())
