"""Train a model: the flags of `etx train` (see `python train_model.py --help`)."""

import sys

from einsum_transformer.cli.app import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
