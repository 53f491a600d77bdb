"""The command `etx-lm-eval`: lm-evaluation-harness's `lm_eval`, with the model `einsum_transformer`.

The harness finds models by its registry only, which has no entry points for other packages, so its own
command cannot know this model.
"""

from __future__ import annotations

import sys

from einsum_transformer.errors import InputError

_WRONG_INPUT, _INTERRUPTED = 2, 130


def main() -> None:
    """Run the command line of the harness on `sys.argv`; exit with 2 for wrong input, after one line."""
    try:
        from einsum_transformer.analysis.tasks import harness

        harness()  # registers the model
        from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

        cli_evaluate()
    except InputError as error:
        message = str(error)
    except ValueError as error:
        message = str(error)
        if not message.startswith("Tasks not found"):
            raise
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
    else:
        return
    print("error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(_WRONG_INPUT)


if __name__ == "__main__":
    main()
