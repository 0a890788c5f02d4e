"""Looking at a forward and a backward pass from outside. The engine and the ops know nothing of it, and nothing here
costs anything while it is not used."""

from tensorlite.tools.draw import draw
from tensorlite.tools.explain import explain
from tensorlite.tools.profile import Profile, profile
from tensorlite.tools.watch import Call, Seen, Size, Watch, watch

__all__ = ["Call", "Profile", "Seen", "Size", "Watch", "draw", "explain", "profile", "watch"]
