"""A model and its tokenizer: its fingerprint, prompts, answers."""

import contextlib
import functools
import hashlib
import inspect
import itertools
from pathlib import Path

import torch
import transformers
from packaging.version import Version
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .calls import option_of
from .frame import Frame, conversation, stop_the_clock, with_a_clock
from .mlp import decoder_of, find_mlps, is_numbers, layers_of, shape_of
from .terminal import FRAME, UserError, out_of_memory, say

# what a forward and generate() call the keys and values of what was read: since 5.24 the other name is one that is warned of
CACHE = "cache" if Version(transformers.__version__) >= Version("5.24.0.dev0") else "past_key_values"
COLDEST = 1e-6  # temperature by which logits can be divided and stay finite
SEARCH_PENALTY, TEST_PENALTY = 1.1, 1.15  # of repetition: the paper's, when it searches and when it tests


# --------------------------------------------------------------------------------------------------------- what model it is


def fingerprint(model) -> str:
    """Tells models apart, whatever dtype they are loaded in: the MLPs' shape, and the names and the signs of 256 numbers of each
    parameter of the decoder's layers, of which fine-tuning turns some and baking adds some. (Not of the embeddings, which one file
    of a model holds once and another twice.) Of quantised weights it is that they are, and the signs of what they stand for, or
    the packed bits where the library has no word for that: so quantising makes another model."""
    (depth, width), content = shape_of(find_mlps(model)), hashlib.sha256()
    packed = getattr(model.config, "quantization_config", None) is not None  # some of these keep weights as buffers
    for block in layers_of(model):
        for name, tensor in tensors_of(block, packed):
            content.update(name.encode() + sampled(tensor.detach()))
    return f"{depth}x{width}-{content.hexdigest()[:16]}"


def tensors_of(block, buffers: bool):
    """Yield a layer's parameters, and buffers, with their names; those that are kept elsewhere are fetched for as long."""
    from accelerate.utils import align_module_device

    for place, module in block.named_modules():
        with align_module_device(module):
            own = dict(module.named_parameters(recurse=False)) | (dict(module.named_buffers(recurse=False)) if buffers else {})
            for name, tensor in own.items():
                yield f"{place}.{name}" if place else name, tensor


def sampled(tensor) -> bytes:
    """The signs of 256 of a tensor's numbers, and their form if they are packed; the bytes of 256 of its codes if they are none."""
    if hasattr(tensor, "full_tensor"):  # of a model that several processes share
        tensor = tensor.full_tensor()
    form = b""
    if hasattr(tensor, "dequantize") and type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        form, tensor = b"packed", tensor.dequantize()  # FP8 keeps all signs
    tensor = tensor.flatten()
    some = tensor[:: max(1, tensor.numel() // 256)][:256].cpu()
    return form + ((some > 0) if is_numbers(tensor) else some.view(torch.uint8)).numpy().tobytes()


def name_of(model) -> str:
    return getattr(model, "source", type(model).__name__)


def shown_name(model) -> str:
    """Its name for a server's clients, who are not told where on this machine it lies."""
    return Path(name_of(model)).name if Path(name_of(model)).exists() else name_of(model)


def dtype_of(model) -> str:
    return str(model.dtype).removeprefix("torch.")


def surroundings(model) -> str:
    """In what arithmetic a model runs, on what (of --tp's processes the devices of one, times their number), and by which versions:
    "float32 on cpu, torch 2.13.0, transformers 5.24.0"."""
    places = [f"cuda:{place}" if isinstance(place, int) else str(place) for place in
              getattr(model, "hf_device_map", {"": model.device}).values() if place != "disk"]
    names = [torch.cuda.get_device_name(place) if place.startswith("cuda") else place for place in dict.fromkeys(places)]
    shared = f"{ranks} x " if (ranks := getattr(model, "tp_size", None) or 1) > 1 else ""
    return f"{dtype_of(model)} on {shared}{' and '.join(names)}, torch {torch.__version__}, transformers {transformers.__version__}"


def end_tokens(model) -> list[int]:
    ends = model.generation_config.eos_token_id
    return ends if isinstance(ends, list) else [] if ends is None else [ends]


# ------------------------------------------------------------------------------------------------------------- prompts

BASE_TEMPLATE = ("{% for turn in messages %}{{ {'system': '', 'user': 'Question: ', 'assistant': 'Answer: '}[turn['role']] }}"
                 "{{ turn['content'] }}\n\n{% endfor %}Answer:")
NEXT_QUESTION = "\nQuestion:"  # what a base model goes on with where its answer is over


def prepared(tokenizer):
    """A tokenizer that pads on the left, and has a chat template: plain text for a base model, whose answers end at
    tokenizer.stop_text and begin with tokenizer.answer_prefix."""
    tokenizer.padding_side = "left"
    if tokenizer.eos_token_id is None:
        raise UserError("its tokenizer has no end token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.stop_text, tokenizer.answer_prefix = None, ""
    if tokenizer.chat_template is None:
        begins = tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = (tokenizer.bos_token or "" if begins else "") + BASE_TEMPLATE
        tokenizer.stop_text, tokenizer.answer_prefix = NEXT_QUESTION, " "
    stop_the_clock(tokenizer)
    if not prompt_ids(tokenizer, conversation("Who are you?")):
        raise UserError("its chat template gives an empty prompt")
    return tokenizer


def as_published(tokenizer):
    """The tokenizer as it was before prepared(), to be saved."""
    tokenizer = with_a_clock(tokenizer)
    if tokenizer.stop_text:
        tokenizer.chat_template = None
    return tokenizer


def render(tokenizer, turns: list[dict]) -> str:
    """The text of a conversation ({"role", "content"}, roles system, user, assistant) up to where the assistant speaks.
    Templates without a system role get it in front of the first question, or, where the assistant begins, as one. Models that
    think first, if they can be told to, are told not to: it is the answer that has a personality."""
    told = [turn["content"] for turn in itertools.takewhile(lambda turn: turn["role"] == "system", turns)]
    asked = turns[len(told):]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        written = "".join(text.split())
        if not asked or all("".join(part.split()) in written for part in told):
            return text
    except Exception as error:  # templates raise what they like
        if not told or not asked:
            raise UserError(f"the chat template of this model refuses the conversation: {error}") from error
    # refused, or passed over, as some templates do with what they do not know
    if begins := asked[0]["role"] != "assistant":
        told, asked = [*told, asked[0]["content"]], asked[1:]
    first = {"role": "user", "content": "\n\n".join(filter(None, told))}
    return render(tokenizer, [first, *asked] if begins or first["content"] else asked)


def prompt_ids(tokenizer, turns: list[dict]) -> list[int]:
    """The ids of a conversation's prompt; its template writes the special tokens itself."""
    return tokenizer(render(tokenizer, turns), add_special_tokens=False)["input_ids"]


def answer_ids(tokenizer, text: str) -> list[int]:
    """The ids of an answer's text as it would follow the prompt."""
    return tokenizer(tokenizer.answer_prefix + text, add_special_tokens=False)["input_ids"]


def beyond_context(model, conversations: list[list[dict]], prompts: list[list[int]], more: list[int]) -> str:
    """Which prompt and what is to follow it are beyond the model's positions, "" where none. The last token is never an input."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return next((f"{turns[-1]['content'][:60]!r}: a prompt of {len(prompt)} tokens and {new} of an answer are beyond this model's "
                 f"context of {most}" for turns, prompt, new in zip(conversations, prompts, more)
                 if most and len(prompt) + max(0, new - 1) > most), "")


def check_length(*asked) -> None:
    """Raise where a conversation is beyond the model's context. asked: what beyond_context() takes."""
    if what := beyond_context(*asked):
        raise UserError(f"{what}: ask shorter, or for less (--max-new-tokens)")


def pad_left(rows: list[list[int]], pad: int | None, device):
    """Left-padded ids and mask, both (rows, longest). pad: None: each row's own first token."""
    longest = max(map(len, rows))
    ids = torch.tensor([[row[0] if pad is None else pad] * (longest - len(row)) + row for row in rows], device=device)
    return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)


# ------------------------------------------------------------------------------------------------------------- answers


def generate_options(tokenizer, prompt_length: int, **options) -> dict:
    """generate()'s options: greedy unless those given say otherwise; a base model's answer ends where it goes on to ask itself the
    next question."""
    def asks_on(input_ids, scores, **kwargs):  # StopStringCriteria would do, but fails on some vocabularies
        latest = tokenizer.batch_decode(input_ids[:, max(prompt_length, input_ids.shape[1] - len(tokenizer.stop_text) - 1):])
        return torch.tensor([tokenizer.stop_text in text for text in latest], device=input_ids.device)

    ends = {"stopping_criteria": [asks_on]} if tokenizer.stop_text else {}
    return {"do_sample": False, "pad_token_id": tokenizer.pad_token_id, **ends, **options}


def without_stop(tokenizer, ids: list[int]) -> list[int]:
    """The ids of an answer without those by which a base model began to ask itself the next question."""
    if tokenizer.stop_text:
        text = answer_text(tokenizer, ids)
        while len(ids) > 1 and len(tokenizer.decode(ids[:-1], skip_special_tokens=True).strip()) >= len(text):
            ids = ids[:-1]
    return ids


def answer_text(tokenizer, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return (text.partition(tokenizer.stop_text)[0] if tokenizer.stop_text else text).strip()


@contextlib.contextmanager
def reading_prompts(model):
    """Have forwards outside generate() meanwhile read prompts. Yields whether nothing is edited or observed in these."""
    patch = next((vars(module)["_neurons_patch"] for module in model.modules() if "_neurons_patch" in vars(module)), None)
    if patch is None:
        yield True
        return
    warned, patch.warned = patch.warned, True  # of forwards that hold no generated token: here none should
    try:
        yield all(isinstance(rows.where, str) and rows.where == "generated" for rows in patch.active.values())
    finally:
        patch.warned = warned


def plain_cache(model, options: dict) -> DynamicCache | None:
    """The cache that generate() would make, where it has a row for each prompt, of keys and values and nothing else."""
    option, cache = functools.partial(option_of, model, options), DynamicCache(config=model.config)
    takes_one = CACHE in inspect.signature(decoder_of(model).forward).parameters
    without = False in (option("use_cache"), getattr(model.config.get_text_config(), "use_cache", None))
    several = (option("num_beams") or 1) > 1 or (option("num_return_sequences") or 1) > 1
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    parts = option("prefill_chunk_size")  # of prompts; up to transformers 5.19 they lose what the cache holds already
    usual = not (without or several or parts or option("cache_implementation") or CACHE in options)
    return cache if takes_one and plain and usual else None


def read_once(model, ids, mask, options: dict) -> dict:
    """What generate() takes beside prompts of which several rows have the same: a cache in which each is read once, but for its
    last token. Nothing where that saves less than a quarter of the reading, where a prompt's tokens are edited or observed, or
    where the options, generate()'s, want another cache."""
    different, prompt_of = torch.cat([ids, mask], 1).unique(dim=0, return_inverse=True)
    if 4 * len(different) > 3 * len(ids) or ids.shape[1] == 1 or (cache := plain_cache(model, options)) is None:
        return {}
    once, seen = (half[:, :-1] for half in different.chunk(2, 1))
    with reading_prompts(model) as as_they_are:
        if not as_they_are:
            return {}
        decoder_of(model)(input_ids=once, attention_mask=seen, position_ids=(seen.cumsum(1) - 1).clamp(min=0), **{CACHE: cache})
    cache.reorder_cache(prompt_of)
    return {CACHE: cache}


def answers(model, tokenizer, conversations: list[list[dict]], max_new_tokens: int = 64, **options) -> list[tuple[str, list[int]]]:
    """One answer a conversation, in one batch: a list of (text, ids); ids end with the end token unless the answer was cut at
    max_new_tokens. Greedy unless options (of generate) say otherwise."""
    if not conversations:
        return []
    prompts = [prompt_ids(tokenizer, turns) for turns in conversations]
    check_length(model, conversations, prompts, [max_new_tokens] * len(prompts))
    ids, mask = pad_left(prompts, None, model.device)  # transformers 5.19 and 5.20 penalise padding as if it had been said
    options = generate_options(tokenizer, ids.shape[1], max_new_tokens=max_new_tokens, **options)
    with torch.no_grad():
        output = model.generate(input_ids=ids, attention_mask=mask, **read_once(model, ids, mask, options), **options)
    ends, results = set(end_tokens(model)), []
    for row in output[:, ids.shape[1]:].tolist():
        row = row[:next((i + 1 for i, token in enumerate(row) if token in ends), len(row))]
        if tokenizer.stop_text and tokenizer.stop_text in tokenizer.decode(row):
            while row[-1] == tokenizer.pad_token_id:  # after an answer that ended before others
                row.pop()
        results.append((answer_text(tokenizer, row), row))
    return results


def answer(model, tokenizer, question: str, persona: str | None = None, max_new_tokens: int = 64, frame: str = FRAME,
           **options) -> str:
    """The model's answer to one question, as induce.py asks it: framed, greedy, repetition penalty 1.15 (as NPTI tests)."""
    asked = [Frame.named(frame).turns(question, persona)]
    return answers(model, tokenizer, asked, max_new_tokens, **{**sampling(), **options})[0][0]


def sampling(temperature: float | None = None, top_p: float | None = None) -> dict:
    """generate()'s options with NPTI's repetition penalty: greedy unless a temperature or top-p is asked for."""
    drawn = {"do_sample": True, "temperature": max(temperature or 1.0, COLDEST), "top_p": top_p or 1.0, "top_k": 0, "min_p": 0.0}
    return {"repetition_penalty": TEST_PENALTY, **(drawn if temperature or top_p else {})}


class BatchSize:
    """Rows of a batch: as many as are asked for, and where memory turns out to be short, half as many from then on, down to one.
    Not where processes share a model, as those of torch's default group are taken to (see world.World): one that began anew would
    leave the others in the batch."""

    def __init__(self, rows: int):
        self.rows = rows

    def fit(self, work, number: int | None = None):
        """work(rows), begun again with fewer rows where memory is short. number: of the rows that there are, where it is known."""
        while True:
            rows = min(self.rows, number or self.rows)
            try:
                return work(rows)
            except (RuntimeError, MemoryError) as error:
                shared = torch.distributed.is_available() and torch.distributed.is_initialized()
                if shared and torch.distributed.get_world_size() > 1 or rows == 1 or not out_of_memory(error):
                    raise
            self.rows = rows // 2  # after the except, which keeps what the failed batch had
            say(f"\nout of memory: batches of {self.rows}")

    def each(self, work, items: list):
        """Yield work(batch) for one batch of the items after the other."""
        while items:
            batch, done = self.fit(lambda rows: (items[:rows], work(items[:rows])), len(items))
            yield done
            items = items[len(batch):]


@contextlib.contextmanager
def enough_memory(words: str):
    """A context in which an error for want of memory becomes one line, that begins so and ends with `words`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise UserError(f"out of memory: {words}") from error


def with_ids(tokenizer, items: list[dict]) -> list[dict]:
    """Answers that are there, with the ids of their text where they have none, or another tokenizer's, which don't spell it. An
    answer without ids is taken as complete: it gets an end token."""
    def spell(item):
        known = item["ids"] and all(0 <= token < size for token in item["ids"])
        return known and answer_text(tokenizer, item["ids"]) == item["answer"]

    size, end = len(tokenizer), tokenizer.eos_token_id
    return [item if spell(item) else {**item, "ids": [*answer_ids(tokenizer, item["answer"]), end]} for item in items]


def answer_inputs(model, tokenizer, items: list[dict], frame: Frame, where: str = "generated"):
    """(what a decoder takes to read answers that are there, bool mask (rows, tokens) of the positions that generating them
    would count: those whose input is a generated token. The last token was never an input.)"""
    asked = [frame.turns(item["question"], item["persona"]) for item in items]
    prompts = [prompt_ids(tokenizer, turns) for turns in asked]
    check_length(model, asked, prompts, [len(item["ids"]) for item in items])
    ids, mask = pad_left([prompt + item["ids"][:-1] for prompt, item in zip(prompts, items)], tokenizer.pad_token_id, model.device)
    counted = mask.bool()
    if where == "generated":
        answered = torch.tensor([len(item["ids"]) - 1 for item in items], device=ids.device)
        counted = torch.arange(ids.shape[1], device=ids.device) >= ids.shape[1] - answered[:, None]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}, counted
