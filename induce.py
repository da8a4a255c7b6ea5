"""Let a language model write in a personality, by editing the neurons that identify.py found.

    python induce.py --trait neuroticism --level 1
    python induce.py --trait extraversion --alpha 2
    python induce.py --trait neuroticism --alpha -1.5 --trait openness --alpha 1 --chat
    python induce.py --profile ada.toml --questions FILE --out FILE
    python induce.py --trait extraversion --alpha 1 --save DIR
    python induce.py --serve --characters DIR
    python induce.py --list

Sets some of the model's neurons while it writes: no prompt, no changed weights, and hardly any time (the edit rides in the op that
computes the MLP). --level adds constants to half a per cent of them, which were trained so that the model writes as under a
persona (personality/train.py); --alpha raises the neurons that fire for the pole and suppresses those of the other one, as NPTI
does (ICLR 2025, arXiv 2410.12327, section 3.3). Below 0 it is the low pole. A file that is missing is made first, except
with --serve or --tp, and for a trait that /trait adds to a chat by levels.
"""

import os

from personality import TRAITS
from personality.terminal import (ALPHA, ANSWER, CHAT_HELP, EDIT_RULES, EVERYWHERE, METHODS, SUPPRESS, TEAM_RULES, WHERE, Flags,
                                  UserError, check_trait, edit_arguments, model_arguments, number, positive, progress, refuse,
                                  resumable, say, script, serve_arguments, show_table, team_argument)

QUESTIONS = (
    "What do you like to do with your friends?",
    "You are invited to a big party. How do you feel about it?",
    "A new colleague joins your team. What do you do?",
    "How would you like to spend a free Friday evening?",
)


def parser() -> Flags:
    flags = Flags(__doc__)
    who = flags.add_argument_group("which personality")
    who.add_argument("--trait", action="append", default=[], metavar="T", help=f"{', '.join(TRAITS)}; repeat it for several")
    who.add_argument("--alpha", action="append", default=[], type=ALPHA, metavar="A",
                     help="strength, one a trait; negative: the low pole (the paper: 0.6 to 1.5)")
    who.add_argument("--level", action="append", default=[], type=ALPHA, metavar="L",
                     help="instead of --alpha: -1 to 1, the same on every model, by trained edits; 1 is the strongest edit at "
                          "which the text stays fluent; several traits share what one may cost")
    who.add_argument("--profile", metavar="FILE", help="a whole character, in TOML: [traits], and method, layers, model, name")
    who.add_argument("--method", choices=tuple(METHODS),
                     help="default: npti, or trained with --level; alpha has a scale of its own in each")
    work = flags.add_argument_group("what to do (default: ask everyday questions, and show the answers side by side)")
    work = work.add_mutually_exclusive_group()
    work.add_argument("-q", "--question", action="append", metavar="TEXT", help="ask this instead of the everyday questions")
    work.add_argument("--questions", metavar="FILE", help="answer a file of questions, one a line, to --out")
    work.add_argument("--chat", action="store_true", help="talk to it; in the chat: " + CHAT_HELP)
    work.add_argument("--save", metavar="DIR", help="write the personality into a plain Llama checkpoint, for any engine")
    work.add_argument("--serve", action="store_true",
                      help="an OpenAI-compatible server, with a personality for each request, and a page")
    work.add_argument("--list", action="store_true", help="show what the folder holds")
    edit = flags.add_argument_group("how to edit")
    edit.add_argument("--keep", type=number(0, 1), default=1.0, metavar="P",
                      help="raise a random share of the neurons, redrawn each step (default: all; NPTI's release: 0.9)")
    edit_arguments(edit, save=True)
    serve_arguments(flags.add_argument_group("of --serve"), save=True)
    more = flags.add_argument_group("of --questions and --save")
    more.add_argument("--out", metavar="FILE", help="where the answers to --questions go (default: the terminal)")
    more.add_argument("--rank", type=positive, metavar="R",
                      help="a smaller checkpoint: of what a layer's raised neurons add, the best approximation of rank R")
    more.add_argument("--verify", action="store_true", help="compare the checkpoint with the live edit, in plain transformers")
    more.add_argument("--verify-server", metavar="URL",
                      help="with --save DIR: compare what a server of that checkpoint says; nothing is written")
    flags.add_argument("--temperature", type=number(0, 100), metavar="X",
                       help="draw tokens at this temperature, of all that there are (default: greedy; 1 with --top-p)")
    flags.add_argument("--top-p", type=number(0, 1), metavar="X",
                       help="draw from the likeliest tokens alone that have this probability together")
    model_arguments(flags)
    team_argument(flags)
    flags.set_defaults(max_new_tokens=None, where=None, suppress=None)  # they hang on what is done
    return flags


DEFAULT = parser().get_default
NPTI_ONLY = ("keep", "suppress", "min_delta", "min_neurons")  # what they say of its neurons, other methods don't have
THERE = "there is something already: move it away, or choose another name"
RAISED = "--rank is of the neurons that NPTI raises: {method} edits raise none"
UNSAVABLE = "a checkpoint can't tell prompt from answer, can't draw neurons, and can't cap an activation"
ONLY_WITH = {"--save DIR": ("rank", "verify", "verify_server"),
             "--serve": ("characters", "host", "port", "api_key", "rows", "queue")}
RULES = [(lambda args, name=name, work=work: getattr(args, name) != DEFAULT(name) and not getattr(args, work[2:].split()[0]),
          f"--{name.replace('_', '-')} goes with {work}") for work, names in ONLY_WITH.items() for name in names] + TEAM_RULES + [
    *EDIT_RULES,
    (lambda args: args.served_model and not (args.serve or args.verify_server),
     "--served-model goes with --serve or --verify-server"),
    (lambda args: args.save and args.where == "generated", f"--save can't be had with --where generated: {UNSAVABLE}"),
    (lambda args: args.save and args.keep < 1, f"--save can't be had with --keep: {UNSAVABLE}"),
    (lambda args: args.save and args.suppress == "cap", f"--save can't be had with --suppress cap: {UNSAVABLE}"),
    (lambda args: args.serve and (args.trait or args.alpha or args.level or args.profile or args.method != "npti"),
     "--serve: each request says which personality it wants: --trait, --level, --alpha, --method and --profile go without it"),
    (lambda args: args.serve and (args.keep < 1 or args.temperature or args.top_p),
     "--serve: clients send temperature and top_p, and the neurons are not drawn: --temperature, --top-p and --keep go without it"),
    (lambda args: args.serve and (args.seed != DEFAULT("seed") or args.batch_size != DEFAULT("batch_size")),
     "--serve: clients send their seeds, and --rows N is the batch: --seed and --batch-size go without it"),
    (lambda args: args.save and (args.temperature or args.top_p or args.max_new_tokens),
     "--save writes no answers: --temperature, --top-p and --max-new-tokens go without it"),
    (lambda args: args.list and (args.trait or args.profile or strengths(args)),
     "--list shows the folder of --neurons: --trait, --level, --alpha and --profile go without it"),
    (lambda args: args.list and args.neurons.startswith("npti:"),
     "--list shows a folder of identify.py: --neurons npti:DIR goes without it"),
    (lambda args: args.tp != 1 and (args.chat or args.save or args.serve or args.list or args.verify_server),
     "--tp: several processes answer questions together: --chat, --save, --serve, --list and --verify-server go without it "
     "(--device-map auto)"),
    (lambda args: args.tp == 1 and os.environ.get("WORLD_SIZE", "1") != "1",
     "torchrun's processes answer together, each with a part of the model: --tp says so"),
    (lambda args: args.rank and not args.profile and args.method != "npti", RAISED),
    (lambda args: args.out and not args.questions, "--out FILE goes with --questions FILE"),
    (lambda args: args.out and os.path.exists(args.out), f"--out {{out}}: {THERE}"),
    (lambda args: args.level and (args.alpha or args.method != "trained"),
     "--level L is of trained edits: --alpha and other methods go without it"),
    (lambda args: args.profile and (args.trait or args.alpha or args.level),
     "--profile FILE says what --trait, --level and --alpha would say: expected one or the other"),
    (lambda args: (args.trait or strengths(args)
                   or not (args.profile or args.questions or args.list or args.verify_server or args.serve))
     and (not args.trait or len(strengths(args)) not in (1, len(args.trait)) or len(set(args.trait)) < len(args.trait)),
     "expected --trait T --level L (or --alpha A), again for each further trait, or --profile FILE: got the traits {trait}, the "
     "levels {level} and the alphas {alpha}")]


def strengths(args) -> list[float]:
    return args.alpha or args.level


def arguments():
    args = parser().parse_args()
    args.trait = [check_trait(trait) for trait in args.trait]
    args.asked_method, args.method = args.method, args.method or ("trained" if args.level else "npti")
    refuse(args, RULES)
    args.npti_only = [f"--{name.replace('_', '-')}" for name in NPTI_ONLY if getattr(args, name) != DEFAULT(name)]
    args.where = args.where or ("all" if args.save else WHERE[0])
    args.suppress = args.suppress or ("zero" if args.save else SUPPRESS[0])
    args.max_new_tokens = args.max_new_tokens or (None if args.serve else ANSWER)
    return args


if __name__ == "__main__":
    script(arguments, "induce")  # imports this file, which needs torch from here on, and runs main()

import functools, itertools, sys  # noqa: E401, E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402

from identify import identify  # noqa: E402
from personality.frame import Frame  # noqa: E402
from personality.methods import LEVELS, Character, Profiles  # noqa: E402
from personality.load import load_asked  # noqa: E402
from personality.model import BatchSize, answers, fingerprint, sampling  # noqa: E402
from personality.neurons import NeuronFolder, show_folder  # noqa: E402
from personality.questions import load_bench  # noqa: E402
from personality.steer import steer  # noqa: E402
from personality.store import Journal, digest, lock_of, only_run, parse_json, read_text, to_line  # noqa: E402
from personality.train import add_trained  # noqa: E402
from personality.world import World  # noqa: E402


def answered(model, tokenizer, profiles: list, rows: list[int], questions: list[str], args) -> list[tuple]:
    """(text, ids) of each question's answer, in one batch. rows: whose each row is, as in steer()."""
    with steer(model, profiles, rows, args.where, args.keep, args.seed):
        asked = [Frame.named(args.frame).turns(question) for question in questions]
        return answers(model, tokenizer, asked, args.max_new_tokens, **sampling(args.temperature, args.top_p))


def side_by_side(model, tokenizer, profiles: Profiles, character: Character, args) -> None:
    """The model's own answer beside the personality's and its opposite's, all in one batch."""
    both, questions = [profiles.of(character), profiles.of(character.opposite())], args.question or QUESTIONS
    thrice = [question for question in questions for _ in range(3)]
    texts = [text for text, _ in answered(model, tokenizer, both, [0, 1, 2] * len(questions), thrice, args)]
    for k, question in enumerate(questions):
        show_table(question, ("the model itself", *(profile.name for profile in both)), [texts[3 * k:3 * k + 3]], lines=True)


def read_questions(path: str, method: str = "npti") -> list[tuple[str, Character | None]]:
    """One question a line: plain text, or a JSON object with the key question and, optionally, a profile of its own (traits
    and alphas, or the name of a profile file)."""
    questions, read = [], functools.cache(Character.read)
    for at, line in enumerate(read_text(path, "--questions ").split("\n"), 1):
        where, character = f"{path}, line {at}", None
        if line.lstrip().startswith("{"):
            values = parse_json(line, where)
            if set(values) - {"question", "profile"}:
                raise UserError(f"{where}: expected question and, optionally, profile, got {repr(sorted(values))[:200]}")
            line, own = values.get("question"), values.get("profile")
            if not isinstance(line, str):
                raise UserError(f'{where}: expected {{"question": text}}, got {values}')
            if own is not None:
                character = read(own, method) if isinstance(own, str) else Character.of(own, where, method)
        if line.strip():
            questions.append((line.strip(), character))
    if not questions:
        raise UserError(f"--questions {path}: no question in it")
    return questions


def answer_batches(model, tokenizer, profiles: Profiles, questions: list[tuple], first: int, args):
    """Yield the lines that answer each batch of (question, character), from question number `first` on."""
    def lines(batch):
        start, batch = batch[0][0], [pair for _, pair in batch]
        torch.manual_seed(args.seed + start)  # the same, if it is sampled, where a run goes on
        people = list({id(character): character for _, character in batch}.values())
        rows = [people.index(character) + 1 for _, character in batch]
        asked, chosen = [question for question, _ in batch], [profiles.of(character) for character in people]
        written = answered(model, tokenizer, chosen, rows, asked, args)
        return [{"question": question, "answer": text, "personality": character.strengths, "method": character.method, "ids": ids}
                for (question, character), (text, ids) in zip(batch, written)]

    return BatchSize(args.batch_size).each(lines, [*enumerate(questions)][first:])


def several_levels(who: Character) -> bool:
    """Whether these are trained edits of more than one trait, which methods.affordable() may bring down."""
    return who.method == "trained" and sum(map(bool, who.strengths.values())) > 1


def answer_file(model, tokenizer, profiles: Profiles, character: Character, args) -> None:
    """Answer a file of questions, JSON lines out: each in its own personality, or in the one of --trait or --profile. What is
    written to --out grows beside it, under a name that tells what is answered, until it is whole."""
    questions = [(text, own or character) for text, own in args.asked]
    batches = functools.partial(answer_batches, model, tokenizer, profiles, questions, args=args)
    if not args.out:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(encoding="utf-8")  # JSON, whatever the terminal's encoding is
        for lines in batches(0):
            sys.stdout.writelines(to_line(line).decode() for line in lines)
        return
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    options = [args.batch_size, args.max_new_tokens, args.seed, args.where, args.keep, args.suppress, args.min_delta,
               args.min_neurons, args.temperature, args.top_p, args.frame]
    keys = {trait: profiles.neurons[trait].key for trait in TRAITS if any(who.strengths.get(trait) for _, who in questions)}
    keys |= {f"{trait}, trained": profiles.neurons.trained(trait).trained_key for trait in keys
             if any(who.method == "trained" and who.strengths.get(trait) for _, who in questions)}
    keys |= {"levels": LEVELS} if any(several_levels(who) for _, who in questions) else {}
    asked = [(text, who.strengths, who.method, who.layers) for text, who in questions]
    key = digest(fingerprint(model), str(model.dtype), tokenizer.chat_template, keys, asked, options)
    part = out.with_name(f".{out.name}.{key}.part")
    if args.world.rank:  # its part of each answer; the first process writes them
        for _ in batches(args.world.agree(None)):
            pass
        return
    with resumable(), only_run(lock_of(out), f"--out {out}: another run is writing it", wait=False):
        if out.exists():  # by now
            raise UserError(f"--out {out}: {THERE}")
        journal = Journal(part)  # a batch is written in one piece
        if len(journal):
            say(f"going on after {len(journal)} of {len(questions)} answers")
        with progress(len(questions), len(journal), "") as bar:
            for lines in batches(args.world.agree(len(journal))):
                journal.append(*lines)
                bar.update(len(lines))
        if out.exists():
            raise UserError(f"--out {out}: {THERE}: the answers wait in {part}")
        os.replace(part, out)


def main(args) -> None:
    from personality import bake, chat

    if args.serve:
        from personality.serve import serve

        return serve(args)
    if args.list:
        return show_folder(args.neurons)
    if args.verify_server:
        return bake.verify_server(args.save, args.verify_server, args.served_model)
    character = Character.read(args.profile, args.method) if args.profile else Character(
        dict(zip(args.trait, itertools.cycle(strengths(args)))), args.method)
    if args.asked_method not in (None, character.method):
        raise UserError(f"--method {args.asked_method}: {args.profile} says {character.method}")
    if args.rank and character.method != "npti":
        raise UserError(RAISED.format(method=character.method))
    if args.questions:  # before the model is loaded
        args.asked = read_questions(args.questions, args.method)
        bare = [text for text, own in args.asked if own is None]
        if bare and not character.strengths:
            raise UserError(f"--questions {args.questions}: no profile stands beside {bare[0]!r}: --trait and --alpha, or "
                            "--profile, say what such a question is answered in")
    everyone = [who for who in (character, *(own for _, own in (args.asked if args.questions else ()) if own)) if who.strengths]
    if args.npti_only and not any(who.method == "npti" for who in everyone):
        raise UserError(f"{', '.join(args.npti_only)}: of the neurons that npti edits, and no personality here is by npti")
    args.world = World.join(args.tp)
    model, tokenizer = load_asked(args, world=args.world)
    torch.manual_seed(args.seed)
    if any(abs(level) > 1 for who in everyone if who.method == "trained" for level in who.strengths.values()):
        args.world.say("levels beyond 1: the text may no longer be fluent")
    if args.where == "all" and any(who.method == "trained" for who in everyone):
        args.world.say(EVERYWHERE)
    if any(map(several_levels, everyone)):
        args.world.say("levels of several traits: where they would cost too much together, all of them are brought down alike")
    for method in sorted({who.method for who in everyone} - {"npti", "trained"}):
        args.world.say(f"{method}: the scale of alpha is its own: {METHODS[method]}")
    missing = functools.partial(identify, model, tokenizer, out=args.neurons, batch_size=args.batch_size, seed=args.seed,
                                frame=args.frame)
    train = functools.partial(add_trained, model, tokenizer, load_bench(None), seed=args.seed)
    made = (missing, train) if args.tp == 1 else (None, None)  # by one process
    neurons = NeuronFolder(model, args.neurons, made[0], Frame.named(args.frame), made[1])
    profiles = Profiles(model, tokenizer, neurons, (args.min_delta, args.min_neurons), args.suppress)
    work = bake.bake if args.save else chat.converse if args.chat else answer_file if args.questions else side_by_side
    with args.world.heard():
        work(model, tokenizer, profiles, character, args)
