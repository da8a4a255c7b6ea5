"""What is kept on disk: nothing is half written, nothing that is done is done again, one run writes at a time.

Files from disk are untrusted: what they hold is checked where it is read, and an error names file, line and reason.
"""

import contextlib
import hashlib
import json
import os
import secrets
from array import array
from collections import Counter
from pathlib import Path

from filelock import FileLock, Timeout

from .terminal import UserError, say

CACHE = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "personality-neurons"
TEXTS = Path(__file__).resolve().parent / "texts"


def digest(*parts) -> str:
    """16 hexadecimal digits that tell values that JSON can hold apart."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def name_beside(path: Path) -> Path:
    """A name for what becomes `path` once it is whole; nobody else's, on a disk that other machines write to, too."""
    return path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")


def plain_path(name: str) -> str:
    """A path as it is written shortest, so that `A/` and `./A` are no other folder than `A`; any other name as it is."""
    return os.path.normpath(name) if os.path.exists(name) else str(name)


def write_atomically(path: Path, data) -> None:
    """A reader, or a run after a crash, sees the old file or the whole new one. data: text, bytes, or an iterable of bytes."""
    temporary = name_beside(path)
    data = data.encode() if isinstance(data, str) else data
    try:
        with naming(path), open(temporary, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path):
    """Have an error of writing, of a full disk say, name the file, as one of opening does."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def cache_folder(name: str) -> Path:
    """A folder of the cache, made where it is not there yet."""
    if CACHE.parts[0] == "~":
        raise UserError("there is no home folder for the cache: set XDG_CACHE_HOME to a folder that can be written to")
    with contextlib.suppress(OSError):
        (CACHE / name).mkdir(parents=True, exist_ok=True)
    if not os.access(CACHE / name, os.W_OK):
        raise UserError(f"{CACHE / name}: can't be written to: set XDG_CACHE_HOME to a folder that can")
    return CACHE / name


@contextlib.contextmanager
def only_run(path: Path, busy: str | None = None, wait: bool = True):
    """Hold the lock file `path` meanwhile. Where another run holds it, this one says `busy`, if that is given, and waits, or
    (wait=False) raises it. A lock of a run that died is free."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise UserError(busy) from None
        if busy:
            say(busy)
        lock.acquire()
    try:
        yield
    finally:
        Path(path).unlink(missing_ok=True)  # before it is released: who waits for it then finds that the name is free
        lock.release()


def lock_of(path: Path) -> Path:
    """The lock file that a run holds while it replaces a file or goes on with it."""
    return path.with_name(f".{path.name}.lock")


# ------------------------------------------------------------------------------------------------------------- reading


def read_text(path, what: str = "") -> str:
    """A file's text; errors begin with `what` (a flag, say) and the path."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{what}{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{what}{path}: not UTF-8 text: can't decode byte {error.start}") from error
    except ValueError as error:  # no path at all: a NUL is in it
        raise UserError(f"{what}{path}: {error}") from error


def once_each(pairs: list[tuple]) -> dict:
    """A JSON object, in which no key stands twice."""
    if len(values := dict(pairs)) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name[:60]!r} stands twice in one object")
    return values


def parse_json(text: str | bytes, where: str):
    """What a JSON text holds; half a surrogate pair, which no file and no tokenizer takes, is an error too."""
    try:
        value = json.loads(text, object_pairs_hook=once_each)
        if (b"\\u" if isinstance(text, bytes) else "\\u") in text:
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:  # of UTF-8, of JSON, or nested too deep
        raise UserError(f"{where}: not JSON: {error}") from error


def read_toml(path, what: str = "") -> dict:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        import tomli as tomllib

    text = read_text(path, what)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what}{path}: not TOML: {error}") from error


def json_lines(path: Path):
    """Yield (line number, object) of a JSON lines file."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if line.strip():
                    value = parse_json(line, f"{path}, line {number}")
                    if not isinstance(value, dict):
                        raise UserError(f"{path}, line {number}: expected a JSON object, got {type(value).__name__}")
                    yield number, value
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def expect_texts(line: dict, keys: list[str], where: str) -> None:
    wrong = [key for key in keys if not isinstance(line.get(key), str)]
    if wrong:
        raise UserError(f"{where}: expected the texts {', '.join(keys)}; wrong or missing: {', '.join(wrong)}")


def lines_of(name: str) -> list[str]:
    """The lines of a file of texts/."""
    return read_text(TEXTS / name).strip().split("\n")


def rendered(template: str, **values) -> str:
    """A template of texts/ with its values; those of an HTML page are escaped, since answers are untrusted text."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEXTS), autoescape=jinja2.select_autoescape(),
                                     keep_trailing_newline=True, trim_blocks=True)
    return environment.get_template(template).render(**values)


def markdown(titles, rows) -> str:
    """A table."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in [list(titles), ["---"] * len(titles), *cells])


# ------------------------------------------------------------------------------------------------------------- journal


def to_line(value: dict) -> bytes:
    """JSON of one line. Half a surrogate pair, which a model can write and no file can hold, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


class Journal:
    """Work that is done, a JSON object a line, in a file that only grows: what a killed run left there is not done again, and a
    last line that it cut off goes. Only the lines' places are held in memory. Threads and processes can append to one file;
    one process begins it where it has a header.

    Lines with a "key" are found by it; the last line of a key counts. header: what all lines depend on, the file's first line;
    a file with another one, or that is no journal, is refused and left as it is. is_line: whether a line holds what it should."""

    def __init__(self, path: Path, header: dict | None = None, is_line=lambda line: True):
        self.path, self.ends, self.number_of, self.is_line = Path(path), array("q", [0]), {}, is_line
        self.first = 0 if header is None else 1  # the number of the first line after the header
        header = {"personality-neurons": self.path.stem, **(header or {})}
        if self.path.exists():
            self.read(header)
        if self.first and len(self.ends) == 1:
            self.append(header)

    def read(self, header: dict) -> None:
        foreign = f"{self.path}: not a file of this program: move it away, or choose another folder"
        with open(self.path, "rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    if number < self.first and not to_line(header).startswith(line):
                        raise UserError(foreign)
                    break
                try:
                    value = json.loads(line)
                    key = value.get("key")
                except (ValueError, AttributeError, RecursionError):
                    raise UserError(foreign) from None
                if number < self.first and value != header:
                    if value.get("personality-neurons") != self.path.stem:
                        raise UserError(foreign)
                    other = [name for name in {**value, **header} if value.get(name) != header.get(name)]
                    before, now = ({name: of.get(name) for name in other} for of in (value, header))
                    raise UserError(f"{self.path} was made with {before}, now it is {now}: choose another --out")
                if number >= self.first and not self.is_line(value):
                    text = line[:100].decode(errors="replace")
                    raise UserError(f"{self.path}, line {number + 1}: not what this program writes there: {text}")
                self.add(len(line), key)
        if self.path.stat().st_size > self.ends[-1]:
            self.append()  # nothing; it waits for who may be writing that line, and cuts it off if nobody is

    def add(self, size: int, key) -> None:
        if key is not None:
            self.number_of[key] = len(self.ends) - 1
        self.ends.append(self.ends[-1] + size)

    def append(self, *values: dict) -> None:
        """Write lines; they are on the disk when this returns."""
        lines = [to_line(value) for value in values]
        alone = only_run(lock_of(self.path))
        # no buffer: what a full disk did not take would be written as the file is closed
        with alone, naming(self.path), open(self.path, "a+b", buffering=0) as file:
            # others may have written meanwhile, or have died in the middle of a line
            start = file.seek(min(self.ends[-1], file.seek(0, os.SEEK_END)))
            self.ends[-1] = start + file.read().rfind(b"\n") + 1
            file.truncate(self.ends[-1])
            try:
                left = b"".join(lines)
                while left:
                    left = left[file.write(left):]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(self.ends[-1])
                raise
            for value, line in zip(values, lines):
                self.add(len(line), value.get("key"))

    def cut(self, lines: int) -> None:
        """Forget all but the first lines."""
        del self.ends[lines + self.first + 1:]
        self.number_of = {key: number for key, number in self.number_of.items() if number < lines + self.first}
        if self.path.exists():
            os.truncate(self.path, self.ends[-1])

    def __len__(self) -> int:
        return len(self.ends) - 1 - self.first

    def __contains__(self, key: str) -> bool:
        return key in self.number_of

    def __getitem__(self, key: str) -> dict:
        with open(self.path, "rb") as file:
            file.seek(self.ends[self.number_of[key]])
            return json.loads(file.readline())

    def __iter__(self):
        with open(self.path, "rb") as file:
            for number, line in enumerate(file):
                if number >= self.first and line.endswith(b"\n"):
                    yield json.loads(line)
