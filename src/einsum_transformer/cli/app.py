"""The commands `einsum-transformer` and `etx`: sub-commands, exit codes and error messages of one line."""

from __future__ import annotations

import errno
import io
import logging
import re
import sys
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any

import typer
from typer.main import get_command

from einsum_transformer.cli.chat import chat
from einsum_transformer.cli.convert import convert
from einsum_transformer.cli.diff import diff
from einsum_transformer.cli.eval import eval
from einsum_transformer.cli.explain import explain
from einsum_transformer.cli.flags import EXIT_CODES, ungrouped
from einsum_transformer.cli.gradcheck import gradcheck
from einsum_transformer.cli.inspect import inspect
from einsum_transformer.cli.machine import machine
from einsum_transformer.cli.merge import merge
from einsum_transformer.cli.parity import parity
from einsum_transformer.cli.plan import plan
from einsum_transformer.cli.precision import precision
from einsum_transformer.cli.profile import profile
from einsum_transformer.cli.pull import pull
from einsum_transformer.cli.quantize import quantize
from einsum_transformer.cli.report import report
from einsum_transformer.cli.run import run
from einsum_transformer.cli.sensitivity import sensitivity
from einsum_transformer.cli.sweep import sweep
from einsum_transformer.cli.train import train
from einsum_transformer.errors import InputError
from einsum_transformer.notes import LOGGER

_WRONG_INPUT, _INTERRUPTED = 2, 130

# The base class of BadParameter, whose name and module differ between versions of typer.
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with 0, 1 if a check found a difference, 2 for wrong input, or 130 if
    interrupted."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters that a model writes
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter(arguments))
    LOGGER.addHandler(handler)
    LOGGER.propagate = False
    try:
        code = _code_of(arguments or ["--help"])
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.propagate = True
        LOGGER.setLevel(logging.NOTSET)  # undo --quiet
    sys.exit(code)


def _code_of(arguments: Sequence[str]) -> int:
    try:
        # Without standalone mode, typer raises errors and returns the code of an early exit.
        code = _commands().main(list(arguments), prog_name="etx", standalone_mode=False)
    except _UsageError as error:
        message = str(error.format_message())  # type: ignore[attr-defined]
    except InputError as error:
        message = str(error)
    except MemoryError as error:
        message = f"not enough memory: {error}"
    except OSError as error:
        if error.errno == errno.EPIPE:
            raise
        message = ": ".join(filter(None, [str(error.filename or ""), error.strerror or str(error)]))
    except (typer.Abort, KeyboardInterrupt):
        return _INTERRUPTED
    else:
        return code if isinstance(code, int) else 0
    print("error:", with_flags(" ".join(message.split()), arguments), file=sys.stderr)
    return _WRONG_INPUT


def with_flags(message: str, arguments: Sequence[str]) -> str:
    """Return the message with the command's flags in place of the library's arguments in backticks."""
    command = _commands().commands.get(arguments[0]) if arguments else None
    known = {each.name: each.opts[0] for each in command.params if each.opts[0][:1] == "-"} if command else {}
    known |= {"adapter": "--adapter-path", "workers": "--ray-workers", "output": "--output"}
    known |= {"accumulation": "--grad-accumulation-steps", "length": "--seq-len"}
    message = re.sub(r"^\w+\(\): (?=`)", "", message)
    return re.sub(r"`(\w+)`", lambda found: known.get(found[1], found[0]), message)


class _Formatter(logging.Formatter):
    """Formats notes for the command line."""

    def __init__(self, arguments: Sequence[str]) -> None:
        super().__init__()
        self.arguments = arguments

    def format(self, record: logging.LogRecord) -> str:
        return f"note: {with_flags(record.getMessage(), self.arguments)}"


@cache
def _commands() -> Any:
    """The click group of all commands, built once: notes need its flags too."""
    return get_command(_application())


def _application() -> typer.Typer:
    # Plain help: rich boxes take another 70 ms to import, and wrap the examples.
    application = typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    application.callback(epilog=EXIT_CODES)(_etx)
    commands = (
        run,
        chat,
        explain,
        plan,
        profile,
        diff,
        inspect,
        train,
        merge,
        quantize,
        convert,
        eval,
        sensitivity,
        precision,
        sweep,
        gradcheck,
        parity,
        report,
        pull,
        machine,
    )
    for command in commands:
        application.command(command.__name__, epilog=EXIT_CODES)(ungrouped(command))
    return application


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            typer.echo(f"einsum-transformer {version('einsum-transformer')}")
        except PackageNotFoundError:
            typer.echo("einsum-transformer (not installed)")
        raise typer.Exit


def _etx(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Transformer language models on a CPU in NumPy, written as einsum equations.

    \b
    etx run -p "The capital of France is" -n 8     continue a text, with a table of the time of each part
    etx chat                                       talk to the default model, SmolLM2-135M-Instruct
    etx profile -p "The sky is" -n 32              the time of each equation, beside its prediction
    etx explain llama --backward                   the program of a model: equations, FLOPs, bytes
    etx inspect my-model                           what a checkpoint contains, and which keys are used
    etx train --lora --data notes.txt -o my-run    train adapters of the default model on a text
    etx merge --adapter-path my-run/step-00000010 -o my-model   add an adapter to the weights
    etx quantize --quantization W4A16g64 -o my-small-model   write a model with weights of 4 bits
    etx eval ppl -f notes.txt                      perplexity on a text; kld: divergence of a quantized model
    etx sensitivity -f notes.txt --budget 90M      which matrices suffer from few bits; a mixed scheme
    etx precision -f notes.txt                     the error of each step against float64
    etx sweep fast_lora --vary seq_len=64,128,256  how time and memory grow with a key of the config
    etx report -p "The sky is" -o report.html      a run as one HTML page: program, arrays, times, attention
    etx gradcheck fast_lora                        hand-derived gradients against central differences
    etx machine                                    measure the BLAS libraries of this machine
    etx run fast_lora                              a model of random weights, described by a JSON file

    Results go to stdout, everything else to stderr. `etx COMMAND --help` shows the flags and more examples.
    """
