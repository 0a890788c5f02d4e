"""The ops under the name that PyTorch gives them: `import tensorlite.nn.functional as F`."""

from tensorlite.ops import *  # noqa: F403 - every op is public
from tensorlite.ops import __all__  # noqa: F401
from tensorlite.words import FUNCTIONS, answers

__getattr__ = answers("tensorlite.nn.functional", FUNCTIONS)
