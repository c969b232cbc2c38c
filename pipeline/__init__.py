"""The application: commands, configuration, planning and the graph (start at ``graph``)."""

import os

__version__ = "0.1.0"

# torch's threads wait for each other by spinning, unless told otherwise before torch is loaded.
# Beside decoders, or anything else that wants the same cores, each wait then lasts until the
# scheduler comes round: labelling took twice the CPU time, and up to nineteen times the wall time
# beside a second such process (2 cores).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
