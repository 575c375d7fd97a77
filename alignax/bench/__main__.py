"""A process that measures one case: `python -m alignax.bench CASE`, where CASE is the JSON of a `Case`; prints JSON."""

import json
import sys
import tempfile
from pathlib import Path

import jax

from alignax.bench import methods
from alignax.bench.case import Case
from alignax.bench.measure import measured
from alignax.config.blame import refusing

if __name__ == "__main__":
    case = Case(**json.loads(sys.argv[1]))
    try:
        with refusing(), tempfile.TemporaryDirectory() as scratch:
            experiment = case.experiment()
            if jax.devices()[0].platform == "cpu" and len(jax.devices()) > 1:
                # Such programs lose the order of their collectives in the cache, and then wait for one another.
                jax.config.update("jax_enable_compilation_cache", False)
            if not case.file:
                methods.write(experiment.config, Path(case.folder))
            experiment.config.workdir = scratch
            print(json.dumps(measured(experiment, case.turns, case.sampling)))
    except ValueError as e:
        sys.exit(f"alignax: error: {' '.join(str(e).split())}")
