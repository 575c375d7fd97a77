"""A process that measures one case: `python -m alignax.bench CASE`, where CASE is the JSON of a `Case`; prints JSON."""

import json
import sys
import tempfile
from pathlib import Path

from alignax.bench import methods
from alignax.bench.case import Case
from alignax.bench.measure import measured
from alignax.config.blame import refusing
from alignax.mesh import order_collectives

if __name__ == "__main__":
    case = Case(**json.loads(sys.argv[1]))
    try:
        with refusing(), tempfile.TemporaryDirectory() as scratch:
            experiment = case.experiment()
            order_collectives()  # before a device is used
            if not case.file:
                methods.write(experiment.config, Path(case.folder))
            experiment.config.workdir = scratch
            print(json.dumps(measured(experiment, case.sampling, case.single, case.first)))
    except ValueError as e:
        sys.exit(f"alignax: error: {' '.join(str(e).split())}")
