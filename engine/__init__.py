"""The training engine: recipes, networks, steps, and the loop that runs them."""

import time

BEGAN = time.monotonic()  # before torch is imported: a run reports its time to the first step
