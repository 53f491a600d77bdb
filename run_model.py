"""Run a model: the flags of `etx run` (see `python run_model.py --help`)."""

import sys

from einsum_transformer.cli.app import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
