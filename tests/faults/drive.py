"""A driver in a process of its own, to be killed: ``python -m tests.faults.drive CONFIG FOLDER ARMED``.

CONFIG is a file with the run's settings as JSON. ARMED is what its actors do; the driver itself is armed by the
environment.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from pipeline.config import RunConfig
from pipeline.driver import run_work
from pipeline.encode_work import EncodeWork
from pipeline.job import start_logging
from tests.faults.runs import load_armed

if __name__ == "__main__":
    config, folder, armed = sys.argv[1:]
    start_logging("info")
    settings = RunConfig.model_validate_json(Path(config).read_text())
    sys.exit(run_work(EncodeWork(settings, functools.partial(load_armed, Path(folder), armed))))
