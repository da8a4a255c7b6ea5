"""What a user meets in the terminal: errors of one line, exit codes, the flags that the scripts share, tables."""

import argparse
import contextlib
import importlib
import math
import os
import re
import sys
from difflib import get_close_matches

from . import TRAITS


class UserError(ValueError):
    """Something that the user can mend: one line on the terminal, exit code 2, no traceback."""


def say(*words) -> None:
    print(*map(printable, words), file=sys.stderr, flush=True)


def say_at_the_end(*words) -> None:
    """What went wrong, on a stderr that may be full or gone: that is not what the exit code is to tell."""
    try:
        say(*words)
    except OSError:
        let_go(sys.stderr)


def let_go(stream) -> None:
    """Have what a stream still holds go nowhere: Python would write it at its end, and fail once more."""
    with contextlib.suppress(OSError):  # one that is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def printable(words) -> str:
    """Text without the characters that steer a terminal, which a file of somebody's may hold."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], str(words))


def script(arguments, module: str) -> None:
    """Run a script: arguments() parses its flags, then `module`, which is the script itself, is imported and its main() works with
    them: wrong flags are answered before anything heavy is imported. Exit code 0, 2 for an error that the user can mend, 130 for
    Ctrl-C, 141 where the reader of our output has gone, as `head` does: as for a signal, 128 and its number."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # it was closed, as a service's may be
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that can't show a dash shows a question mark
    code = 0
    try:
        args = arguments()
        importlib.import_module(module).main(args)
        sys.stdout.flush()  # now, where what goes wrong still has its exit code
    except UserError as error:
        say_at_the_end(f"error: {' '.join(str(error).split())}")
        code = 2
    except KeyboardInterrupt as error:
        say_at_the_end("\ninterrupted" + (f": {error}" if str(error) else ""))
        code = 130
    except BrokenPipeError:
        code = 141
        let_go(sys.stderr)
    except OSError as error:  # a full disk, a folder that may not be written to
        say_at_the_end(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}")
        code = 2
    except ModuleNotFoundError as error:
        if not error.name or error.name.split(".")[0] == __package__:
            raise
        say_at_the_end(f"error: {sys.executable} has no module {error.name}: pip install -e . (server: -e '.[serve]') with it, or "
                       "activate the environment that has it")
        code = 2
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        words = (str(error).strip() or "MemoryError").partition("\n")[0][:120]
        say_at_the_end(f"error: out of memory ({words}): a smaller --batch-size or --max-new-tokens, --dtype bfloat16, "
                       "--quantize 4bit or --device-map auto leaves room")
        code = 2
    try:
        sys.stdout.flush()
    except OSError:
        let_go(sys.stdout)
    sys.exit(code)


def out_of_memory(error: BaseException) -> bool:
    """Whether it is a processor's or a GPU's, as torch and the libraries under it say it."""
    said = "can't allocate memory", "Cannot allocate memory", "out of memory", "ALLOC_FAILED", "bad_alloc"
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or any(words in str(error) for words in said))


@contextlib.contextmanager
def resumable():
    """For work that the same command goes on with: script() says so when it is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("what was finished is kept, and the same command goes on from there") from None


def show_table(title: str, columns, rows, lines: bool = False, whole=()) -> None:
    """Print a table. A cell that is a text is shown as it is, never as markup; one that is a rich object keeps its style.
    lines: with rules between the cells, and as wide as the terminal. whole: the columns that are not cut where there is little
    room: the others go over more lines."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(printable(title), style="bold" if lines else ""), title_justify="left", header_style="bold",
                  **({"show_lines": True, "expand": True} if lines else {"box": None}))
    for column in columns:
        table.add_column(Text(printable(column)), ratio=1 if lines else None, no_wrap=column in whole, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) if isinstance(cell, str) else cell for cell in row))
    console = Console()
    with console.capture() as shown:  # rich would end the process itself where the reader has gone
        console.print(table)
    print(shown.get(), end="", flush=True)


def progress(total: int, done: int, title: str, unit: str = "answer", hidden: bool = False):
    """A bar to be used in `with`."""
    from tqdm import tqdm

    return tqdm(total=total, initial=done, desc=title, unit=unit, smoothing=0.1, disable=hidden)


class Flags(argparse.ArgumentParser):
    """argparse, whose errors are one line like all others. whence: where what is parsed stands, if that is no command line."""

    def __init__(self, description: str, whence: str = ""):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.whence = whence

    def error(self, message):
        raise UserError(f"{self.whence}: {message}" if self.whence else f"{message} ({self.prog} --help)")

    def parse_args(self, *given):
        args = super().parse_args(*given)
        for action in self._actions:
            values = getattr(args, action.dest, None)
            several = isinstance(values, list) and (values or action.nargs or values is action.default)
            for value in values if several else [values]:
                wrong = (isinstance(value, list)  # what --flag=-- is in Python 3.11
                         or isinstance(value, str) and (not value.strip() or re.search(r"[\ud800-\udfff]", value)))
                if wrong and value != action.const:  # const: what a flag without its text means
                    self.error(f"argument {'/'.join(action.option_strings)}: expected a text, got {value!r}")
        return args


def refuse(args, rules) -> None:
    """Raise the message of the first of `rules`, (whether it applies to args, message) each, that applies. {names} in a message
    are args' values."""
    for applies, message in rules:
        if applies(args):
            raise UserError(message.format(**vars(args)))


def whole_number(least: int, most: int | None = None):
    """The type of a flag that takes a whole number."""
    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,18}", text) or not least <= int(text) <= (most or int(text)):
            raise argparse.ArgumentTypeError(f"expected a whole number from {least}{f' to {most}' if most else ''}, got {text}")
        return int(text)

    return parse


positive = whole_number(1)


def number(above: float = -math.inf, to: float = math.inf, least: float = -math.inf):
    """The type of a flag that takes a number above one bound, or from it on (least), at most the other; NaN is in no range."""
    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if above < float(text) <= to and least <= float(text):
                return float(text)
        bounds = [f"above {above:g}"] * (above > -math.inf) + [f"at least {least:g}"] * (least > -math.inf)
        bounds += [f"at most {to:g}"] * (to < math.inf)
        raise argparse.ArgumentTypeError(f"expected a number {', '.join(bounds)}, got {text}")

    return parse


ALPHA = number(-1000, 1000)


def check_alpha(text) -> float:
    try:
        return ALPHA(text)
    except argparse.ArgumentTypeError as error:
        raise UserError(f"alpha: {error}") from None


CHAT_HELP = "/trait NAME [ALPHA], /alpha NUMBER (of the last trait), /reset (forget the conversation), /quit"


def check_trait(trait: str) -> str:
    if trait.lower() not in TRAITS:
        raise UserError(f"trait {trait}: expected one of {', '.join(TRAITS)}")
    return trait.lower()


ANSWER = 64  # tokens of an answer, at most
IN_FLIGHT = 16  # requests to a server at once
MIN_DELTA = 0.1  # see edit_arguments()
FRAME = "person"  # how questions are put, unless --frame says otherwise: see frame.py
FRAMES = (FRAME, "none")  # that have a name
WHERE = ("generated", "all")  # which tokens are edited or observed; here and below the first is NPTI's
SUPPRESS = ("cap", "zero", "none")  # what becomes of the opposite pole's neurons

METHODS = {  # by which a personality becomes edits, and what alpha is in each
    "npti": "NPTI's gamma",
    "trained": "levels: 1 is the strongest edit at which perplexity grows 1.3 times at most, and what is between is in proportion",
    "dpn-le": "alpha times the mean difference of a neuron's product",
    "dpn-le-weighted": "alpha times 0.75 to 1 of the mean difference of a neuron's product",
    "activation": "alpha times the mean difference of the residual stream",
}
EVERYWHERE = "levels are read off edits of generated tokens: on the prompt's as well, as a checkpoint has them, they cost more"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # how many write them


def frame_text(text: str) -> str:
    """A frame's name, or a text of one's own; one word that is nearly a name is not taken for a text."""
    meant = get_close_matches(text.lower(), FRAMES, 1, 0.7) if text not in FRAMES and len(text.split()) == 1 else ()
    if meant:
        raise argparse.ArgumentTypeError(f"expected {', '.join(FRAMES)} or a text (which, so near to these, needs a second word), "
                                         f"got {text}: is {meant[0]} meant?")
    return text


def loading_arguments(flags: Flags) -> None:
    """Which model, how it is loaded, and how it is asked."""
    flags.add_argument("--model", help="hub id, directory or .gguf file (default: SmolLM2-135M-Instruct)")
    where = flags.add_mutually_exclusive_group()
    where.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    where.add_argument("--device-map", choices=("auto", "balanced", "sequential"),
                       help="spread the model over all GPUs and, where they are too small, memory and disk, as accelerate does")
    flags.add_argument("--quantize", choices=("8bit", "4bit", "int8"),
                       help="quantise the weights while they are loaded: 8bit and 4bit by bitsandbytes, int8 by torchao "
                            "(default: as they are saved)")
    flags.add_argument("--dtype", choices=tuple(DTYPES.values()), type=lambda text: DTYPES.get(text, text),
                       help="default: bfloat16 on a GPU, and on a CPU that has instructions for it; else float32")
    flags.add_argument("--frame", default=FRAME, metavar="TEXT", type=frame_text,
                       help="how questions are put: person (an interview with a person), none (bare), or a text of your own that "
                            "the system prompt begins with (default: %(default)s)")


def model_arguments(flags: Flags) -> None:
    """The flags that all three scripts share."""
    loading_arguments(flags)
    flags.add_argument("--batch-size", type=lambda text: text if text == "auto" else positive(text), default=64, metavar="N",
                       help="rows of a batch (default: %(default)s); fewer where memory is short, but for --tp and "
                            "lm-evaluation-harness; auto: as many as a GPU's memory holds, to be given as a number where a run is "
                            "to go on")
    flags.add_argument("--max-new-tokens", type=positive, default=ANSWER, metavar="N",
                       help=f"length of an answer (default: {ANSWER}; the paper's search: 500; --serve: 512, or what the client "
                            "asks for)")
    flags.add_argument("--seed", type=whole_number(0, (1 << 32) - 1), default=0, metavar="N", help="default: %(default)s")


TEAM_RULES = [
    (lambda args: args.device_map and os.environ.get("WORLD_SIZE", "1") != "1",
     "--device-map {device_map} spreads one model over all GPUs: one process; --tp shares a model among torchrun's"),
    (lambda args: args.tp != 1 and ":" in (args.device or ""), "--device {device}: --tp gives each process a card of its own"),
    (lambda args: args.quantize and args.tp != 1, "--quantize {quantize}: --tp goes without it")]


def team_argument(flags: Flags) -> None:
    flags.add_argument("--tp", nargs="?", type=positive, const=0, default=1, metavar="N",
                       help="tensor parallel: N of the processes that torchrun --nproc-per-node starts (default: all of them) hold "
                            "the model together")


def where_argument(flags: Flags, note: str = "") -> None:
    flags.add_argument("--where", choices=WHERE, default=WHERE[0],
                       help=f"which tokens: the answer's, as in NPTI, or the prompt's as well (default: generated{note})")


def suppress_argument(flags: Flags, note: str = "") -> None:
    flags.add_argument("--suppress", choices=SUPPRESS, default=SUPPRESS[0],
                       help="what becomes of the opposite pole's neurons: capped at 0, as in NPTI, set to 0, or nothing (default: "
                            f"cap{note})")


EDIT_RULES = [
    (lambda args: args.neurons.startswith("npti:") and (args.min_delta != MIN_DELTA or args.min_neurons),
     "--neurons {neurons}: these neurons were selected already: --min-delta and --min-neurons go without it")]


def edit_arguments(flags, save: bool = False) -> None:
    """How neurons become edits, in induce.py and in the server. save: there is --save, which has other defaults."""
    flags.add_argument("--neurons", default="neurons", metavar="DIR",
                       help="folder of neuron files (default: %(default)s); npti:DIR: of NPTI's released ones")
    flags.add_argument("--min-delta", type=number(least=0, to=1), default=MIN_DELTA, metavar="D",
                       help="edit neurons that fire on a share of tokens at least D larger under one pole than under the "
                            "other (default: %(default)s)")
    flags.add_argument("--min-neurons", type=positive, metavar="N",
                       help="at least so many neurons a pole (default: 0.436 %% of all, NPTI's 2,000 of Llama-3-8B's)")
    where_argument(flags, "; --save: all" if save else "")
    suppress_argument(flags, "; --save: zero" if save else "")


def serve_arguments(flags, save: bool = False) -> None:
    """Of the server. save: there is --save, with --verify-server."""
    flags.add_argument("--characters", metavar="DIR", help="profile files (*.toml) that clients may ask for by name")
    flags.add_argument("--host", default="127.0.0.1", metavar="ADDRESS",
                       help="to listen on (default: %(default)s); any but localhost and other loopback addresses needs a key")
    flags.add_argument("--port", type=whole_number(0, 65535), default=8000, metavar="N", help="default: %(default)s; 0: any")
    flags.add_argument("--api-key", metavar="KEY", help="what clients must send (default: $PERSONALITY_API_KEY, or none)")
    flags.add_argument("--rows", type=positive, default=32, metavar="N", help="requests in a batch (default: %(default)s)")
    flags.add_argument("--queue", type=whole_number(0), default=128, metavar="N",
                       help="requests that may wait, beside those (default: %(default)s); more get 429")
    flags.add_argument("--served-model", metavar="NAME",
                       help="the model's name for clients (default: its own)" + (
                           "; with --verify-server: its name there (default: the first that it lists)" if save else ""))


def bench_argument(flags: Flags) -> None:
    flags.add_argument("--bench", metavar="DIR",
                       help="questions and personas in PersonalityBench's layout: a folder, or a dataset of the hub (default: "
                            "built in)")


def writer_arguments(flags: Flags, size: int) -> None:
    """Of --build-bench, and of servers that write. size: search questions that are built by default."""
    flags.add_argument("--build-bench", metavar="DIR", help="have a model write a bench, and stop there")
    flags.add_argument("--size", type=positive, metavar="N",
                       help=f"of --build-bench: search questions a trait (default: {size}; PersonalityBench: 36000)")
    flags.add_argument("--writer", metavar="MODEL_OR_URL", help="who writes the bench of --build-bench: a model, as --model takes "
                       "it, or the URL of an OpenAI-compatible server (default: $OPENAI_BASE_URL, else --model)")
    flags.add_argument("--served-model", metavar="NAME", default=os.environ.get("OPENAI_MODEL") or None,
                       help="what --engine or --writer URL calls the model (default: $OPENAI_MODEL, else the first that it lists)")
    flags.add_argument("--in-flight", type=positive, default=IN_FLIGHT, metavar="N",
                       help="requests to a server at once (default: %(default)s)")
