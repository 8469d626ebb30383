"""Sample results, which tests of several packages read, lie with the tests of `dualpath.results`."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "results"))
