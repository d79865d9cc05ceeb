"""What every run needs and no equation does: flags, run folder, resume, previews, metrics, files, one-line errors.

The scripts import it before torch (pyproject.toml sorts harness.flags first): OpenMP reads how its threads wait when
torch is loaded. By default they spin, and beside other work on the same cores a step takes many times longer.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
