"""What every run needs and no equation does: flags, run folder, resume, previews, metrics, files, one-line errors.

The scripts import it before torch (pyproject.toml sorts harness.flags first): OpenMP reads how its threads wait when
torch is loaded. By default they spin, and beside other work on the same cores a step takes many times longer.
"""

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
usual = sys.excepthook


def without_interrupts(kind, error, trace):
    """Ctrl-C while torch is imported ends a program without a traceback, as it does later (see one_line_errors)."""
    if not issubclass(kind, KeyboardInterrupt):
        usual(kind, error, trace)


sys.excepthook = without_interrupts
