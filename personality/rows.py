"""Which token belongs to which personality while generate() runs: a patched model, and the token maps that its MLPs read.

NPTI edits and counts the positions whose input is a generated token. Neither shapes nor the cache's length nor the mask tell those
reliably from a prompt's: so generate() is followed from without, by a stopping criterion that stops nothing.
"""

import contextlib
import inspect
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import GenerationMixin, MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from .mlp import compare, decoder_of, find_mlps, through_op
from .terminal import UserError

NOTHING = (None,) * 4  # the op's arguments without edits, and without statistics
UNMAPPABLE = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")  # they mix the rows of a batch


class Rows:
    """Which number (a profile, 0: none; or a group, -1: none) each token of a forward has.

    rows: a number for each prompt, or None: all the first if there is one choice only, else first, first + 1, ...
    where: "generated" (positions whose input is a generated token, as NPTI does), "all" (the prompt as well; padding
    never), or a bool tensor (rows, tokens) for forwards of that shape outside generate()."""

    def __init__(self, rows, choices: int, none: int, where):
        if not (torch.is_tensor(where) or where in ("generated", "all")):
            raise UserError(f'where: expected "generated", "all" or a bool tensor, got {where!r}')
        self.choices, self.none, self.where = choices, none, where
        self.assign(rows)
        self.buffers = {}  # by size: the decode map, at a fixed address, as a captured graph wants it
        self.tokens = None  # int32 (batch * tokens) of the forward that runs, or None: nothing is edited or observed

    def assign(self, rows) -> None:
        """Set the number of each prompt, from the next generate() or forward on."""
        if rows is not None:
            given, last = rows.tolist() if torch.is_tensor(rows) else rows, self.none + self.choices
            with contextlib.suppress(TypeError, ValueError, RuntimeError):  # what is no tensor is refused below
                rows = torch.as_tensor(rows)
            if not (torch.is_tensor(rows) and rows.dim() == 1 and (not len(rows) or (
                    not rows.is_floating_point() and rows.dtype != torch.bool and self.none <= int(rows.min()) <= int(rows.max()) <= last))):
                raise UserError(f"rows: expected a whole number from {self.none} to {last} for each prompt, got {given!r}")
            rows = rows.to(torch.int32)
        self.rows, self.spread = rows, {}  # spread: by batch, what of() found

    def of(self, batch: int, prompts: int, device):
        """int32 (batch): beams and several returned sequences stay within their prompt."""
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
        if (size, device) not in self.buffers:
            with torch.inference_mode(False):  # it is written in whatever mode comes
                self.buffers[size, device] = torch.full((size,), self.none, dtype=torch.int32, device=device)
            torch._dynamo.mark_static_address(self.buffers[size, device])
        return self.buffers[size, device]


@dataclass(eq=False)
class Active:
    """What steer() or observe() put on a model."""

    rows: Rows
    layers: list[tuple]  # by layer: the op's arguments behind the token map
    on_map: Callable = lambda tokens: None  # called with each forward's map
    before_decode: Callable = lambda: None  # called once a step, before its map is used

    def arguments(self, index: int) -> tuple:
        """The op's, for a layer of the forward that runs."""
        return NOTHING if self.rows.tokens is None else (self.rows.tokens, *self.layers[index])


class Verdict(StoppingCriteria):
    """A user's criterion, remembering its last verdict: bool (rows), whatever form it gave it."""

    def __init__(self, inner):
        self.inner, self.done = inner, None

    def __getattr__(self, name):
        return getattr(self.__dict__["inner"], name)

    def __call__(self, input_ids, scores, **kwargs):
        done = self.inner(input_ids, scores, **kwargs)
        self.done = torch.as_tensor(done, dtype=torch.bool, device=input_ids.device).expand(len(input_ids))
        return self.done


class Follow(StoppingCriteria):
    """Comes last, stops nothing, and needs no synchronisation with the device."""

    def __init__(self, patch: "Patch", ends, verdicts: list[Verdict]):
        self.patch, self.ends, self.verdicts = patch, ends, verdicts

    def __call__(self, input_ids, scores, **kwargs):
        self.patch.step(input_ids, self.ends, [verdict.done for verdict in self.verdicts])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Patch:
    """The one record of a patched model, shared by whatever steer() and observe() are active on it, in any order. While generate()
    runs, phase is "prompt" until the first token is chosen, then "decode"; outside it is None."""

    def __init__(self, model):
        self.model, self.decoder, self.mlps = model, decoder_of(model), find_mlps(model)
        self.steering: Active | None = None
        self.observing: Active | None = None
        self.phase, self.prompts, self.mask, self.alive = None, 0, None, None
        self.batch, self.left, self.warned = 0, 0, False  # left: tokens a row that are to be read until the next one is chosen
        self.generating, self.thread = threading.Lock(), None
        self.restore = []

    def __deepcopy__(self, memo):
        raise UserError("a model can't be copied while it is steered or observed: leave that first")

    @property
    def active(self) -> list[Active]:
        return [active for active in (self.steering, self.observing) if active]

    def put_on(self, steering: Active | None, observing: Active | None) -> None:
        for what, new, old in (("steered", steering, self.steering), ("observed", observing, self.observing)):
            if new and old:
                raise UserError(f"the model is {what} already: leave that first, or put both into one")
        if not self.restore:
            try:
                self.attach()
            except BaseException:
                self.detach()
                raise
        self.steering, self.observing = steering or self.steering, observing or self.observing

    def take_off(self, active: Active) -> None:
        self.steering, self.observing = (None if old is active else old for old in (self.steering, self.observing))
        if not self.active:
            self.detach()

    def attach(self) -> None:
        self.model._neurons_patch = self
        self.restore.append(lambda: self.model.__dict__.pop("_neurons_patch"))
        for index, mlp in enumerate(self.mlps):
            forward = through_op(mlp, index, self.arguments)
            compare(mlp, forward)
            self.replace(mlp.module, "forward", forward)
        if hasattr(self.model, "generate"):
            self.replace(self.model, "generate", self.followed(self.model.generate))
        for name in UNMAPPABLE:
            if hasattr(self.model, name):
                self.replace(self.model, name, refusing(name))
        self.restore.append(self.decoder.register_forward_pre_hook(self.before_forward, with_kwargs=True).remove)
        self.forget_compiled()

    def replace(self, owner, name: str, value) -> None:
        old = owner.__dict__.get(name)
        setattr(owner, name, value)
        self.restore.append(lambda: setattr(owner, name, old) if old is not None else delattr(owner, name))

    def detach(self) -> None:
        for undo in reversed(self.restore):
            undo()
        self.restore.clear()
        self.forget_compiled()

    def forget_compiled(self) -> None:
        self.model.__dict__.pop("_compiled_call", None)  # generate()'s, which would go on with the forwards of before

    def arguments(self, index: int) -> tuple:
        """The op's arguments after act, for a layer of the forward that runs."""
        edits, statistics = (active.arguments(index) if active else NOTHING for active in (self.steering, self.observing))
        return *edits, *statistics

    def before_forward(self, module, args, kwargs) -> None:
        """Make the token maps: once a forward, shared by all layers."""
        ids = args[0] if args else kwargs.get("input_ids")
        ids = ids if ids is not None else kwargs["inputs_embeds"]
        batch, tokens = ids.shape[:2]
        self.check_caller(tokens)
        self.batch = batch
        for active in self.active:
            active.rows.tokens = self.map(active.rows, batch, tokens, ids.device, kwargs)
            if active.rows.tokens is not None:
                active.on_map(active.rows.tokens)

    def check_caller(self, tokens: int) -> None:
        """Raise for forwards that would be taken for what they are not."""
        if torch.compiler.is_compiling():  # there are no frames to look at
            return
        if self.phase is None:
            if inside_generate(self.model):
                raise UserError("this generate() was taken from the model before it was steered or observed: call model.generate() anew")
        elif self.thread != threading.get_ident():
            raise UserError("another thread is in generate() of this model: while it is steered or observed, one at a time")
        elif self.left <= 0:
            raise UserError("the model was called inside its own generate(), by a stopping criterion or a logits processor: not supported "
                            "while steering or observing")
        self.left -= tokens

    def map(self, rows: Rows, batch: int, tokens: int, device, kwargs):
        """int32 (batch * tokens), or None: nothing of this forward is mapped."""
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
            start = cached(kwargs)
            mask = self.mask[:, start:start + tokens].repeat_interleave(batch // self.prompts, 0)
        elif mask is None:
            mask = torch.ones((batch, tokens), dtype=torch.bool, device=device)
        elif mask.dim() != 2:
            raise UserError(f"attention_mask: expected (rows, tokens) while steering or observing, got shape {tuple(mask.shape)}")
        of_rows = rows.of(batch, self.prompts if self.phase else batch, device)[:, None]  # (batch, 1)
        return torch.where(mask[:, -tokens:].bool(), of_rows, rows.none).to(torch.int32).flatten()

    def followed(self, original):
        """model.generate, so that it tells prompt from decode and which rows have ended."""
        names = list(inspect.signature(original).parameters)

        def generate(*args, **kwargs):
            kwargs |= zip(names, args)
            option = options_of(self.model, kwargs)
            refuse_mixing(option)
            (prompt, mask, ends), given = prompt_of(kwargs, option), list(kwargs.pop("stopping_criteria", None) or [])
            if option("stop_strings") and kwargs.get("tokenizer") is not None:
                given.append(StopStringCriteria(kwargs["tokenizer"], option("stop_strings")))
            criteria = [criterion if isinstance(criterion, MaxLengthCriteria) else Verdict(criterion) for criterion in given]
            follow = Follow(self, ends, [criterion for criterion in criteria if isinstance(criterion, Verdict)])
            if not self.generating.acquire(blocking=False):
                raise UserError("generate() of this model is running already: while it is steered or observed, one at a time")
            try:
                self.phase, self.prompts, self.mask, self.alive = "prompt", len(prompt), mask, None
                self.left, self.thread = mask.shape[1] - cached(kwargs), threading.get_ident()
                return original(**{**kwargs, "stopping_criteria": StoppingCriteriaList([*criteria, follow])})
            finally:
                self.phase = self.alive = self.mask = self.thread = None
                self.generating.release()

        return generate

    def step(self, input_ids, ends, verdicts) -> None:
        """A token was chosen for every row: what follows is decode, without the rows that have just ended."""
        batch, latest = self.batch, input_ids[:, -1]  # batch: of the last forward, and so of the next
        self.left = 1
        if self.alive is None:
            self.phase, self.alive = "decode", torch.ones(batch, dtype=torch.bool, device=latest.device)
        if len(latest) == batch:  # beam search asks about more candidates than it goes on with, of which none has ended
            self.alive &= ~torch.isin(latest, ends)
            for done in verdicts:
                self.alive &= ~done
        for active in self.active:
            rows = active.rows
            of_rows = rows.of(batch, self.prompts, latest.device)
            rows.buffer(batch, latest.device).copy_(torch.where(self.alive, of_rows, rows.none))
            active.before_decode()


def cached(kwargs) -> int:
    cache = kwargs.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


def refusing(name: str):
    def call(*args, **kwargs):
        raise UserError(f"{name}() mixes the rows of a batch: not supported while steering or observing")

    return call


def inside_generate(model) -> bool:
    """Whether a model's generate() is on the stack, whatever wraps it."""
    code, frame = inspect.unwrap(GenerationMixin.generate).__code__, sys._getframe(1)
    while frame and not (frame.f_code is code and frame.f_locals.get("self") is model):
        frame = frame.f_back
    return frame is not None


def options_of(model, kwargs):
    """A function that looks an option up as generate() does: what is not given is the model's own."""
    places = (kwargs.get("generation_config"), model.generation_config)

    def option(name):
        found = (kwargs.get(name), *(getattr(place, name, None) for place in places))
        return next((value for value in found if value is not None), None)

    return option


def refuse_mixing(option) -> None:
    assisted = option("assistant_model") is not None or option("prompt_lookup_num_tokens")
    for applies, what in ((assisted, "assisted decoding mixes the rows of a batch"),
                          (option("use_cache") is False, "generate(use_cache=False) feeds every token again at every step"),
                          (option("guidance_scale") not in (None, 1), "classifier-free guidance calls the model inside its own generate()")):
        if applies:
            raise UserError(f"{what}: not supported while steering or observing")


def prompt_of(kwargs, option):
    """(prompt, its mask (rows, tokens), the end tokens) of a call of generate()."""
    prompt = next((kwargs[name] for name in ("inputs_embeds", "inputs", "input_ids") if kwargs.get(name) is not None), None)
    if prompt is None:
        raise UserError("generate(): expected input_ids or inputs_embeds")
    mask, pad, ends = kwargs.get("attention_mask"), option("pad_token_id"), option("eos_token_id")
    ends = torch.tensor([] if ends is None else ends, dtype=torch.long, device=prompt.device).flatten()
    if mask is None:  # as generate() does it
        mask = torch.ones(prompt.shape[:2], dtype=torch.long, device=prompt.device)
        if prompt.dim() == 2 and pad is not None and pad not in ends.tolist():
            mask = (prompt != pad).long()
    return prompt, mask, ends


def generator_of(model):
    """The module inside a model (a PeftModel, say) whose generate() it is: there both ways to call it meet."""
    return next((module for module in model.modules() if isinstance(module, GenerationMixin)), model)


@contextlib.contextmanager
def patched(model, steering: Active | None = None, observing: Active | None = None):
    """Have the model steered or observed meanwhile; the first puts the patch on, the last takes it off."""
    model = generator_of(model)
    patch = model.__dict__.get("_neurons_patch") or Patch(model)
    patch.put_on(steering, observing)
    try:
        yield patch
    finally:
        patch.take_off(steering or observing)
