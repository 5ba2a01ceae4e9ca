"""The fuzz tests need hypothesis, which the check of the oldest dependencies does not install."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("hypothesis") else ["test_*.py"]
