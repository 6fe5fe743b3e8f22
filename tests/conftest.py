"""For every folder of tests: oracles.py becomes importable (pytest puts the folder of a conftest on the path)."""

import os

# Read when torch is first imported, and inherited by subprocesses. The models here are so small that a second thread
# costs more waiting than it saves, ten times as much on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
