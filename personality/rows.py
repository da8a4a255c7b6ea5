"""Which token belongs to which personality while generate() runs: a patched model, and the token maps that its MLPs read.

NPTI edits and counts the positions whose input is a generated token. Neither shapes nor the cache's length nor the mask tell those
reliably from a prompt's: so generate() is followed from without, by a stopping criterion that stops nothing.
"""

import contextlib
import functools
import inspect
import threading
import warnings
from collections.abc import Callable

import torch
from transformers import GenerationMixin, MaxLengthCriteria, StoppingCriteria, StoppingCriteriaList, StopStringCriteria

from .calls import cached, inside_generate, option_of, prompt_of, refuse_batching, refuse_mixing
from .mlp import ARGUMENTS, Routed, compare, decoder_of, find_mlps, through_op
from .terminal import UserError

NO_ARGUMENTS = (None,) * 4  # the op's arguments without edits, and without statistics
# one thread at a time puts a patch on or takes it off, of any model; R: Python may close a forgotten with while a thread has it
PATCHING = threading.RLock()


class Rows:
    """What steer() or observe() have on a model: which number (a profile, 0: none; or a group, -1: none) each token of a forward
    has, and what the op takes after that.

    rows: a number for each prompt, or None: all the first if there is one choice only, else first, first + 1, ...
    where: "generated" (positions whose input is a generated token, as NPTI does), "all" (the prompt as well; padding
    never), a bool tensor (rows, tokens) for forwards of that shape outside generate(), or, for an engine that knows whose each
    token is, a function that is called at each forward with its rows and tokens, and gives the map, or None for no token.
    held: what the op takes after the token map, an op.SiteTensors; shared: what it takes after these, by device."""

    def __init__(self, rows, choices: int, none: int, where, held, shared: dict):
        if not (torch.is_tensor(where) or callable(where) or where in ("generated", "all")):
            raise UserError(f'where: expected "generated", "all", a bool tensor or a function, got {where!r}')
        self.choices, self.none, self.where, self.held, self.shared = choices, none, where, held, shared
        self.assign(rows)
        self.buffers = {}  # by size: the decode map, at a fixed address, as a captured graph wants it
        self.tokens = None  # int32 (batch * tokens) of the forward that runs, or None: nothing is edited or observed
        self.elsewhere = {}  # by device: copies of tokens, for layers that are not where the input is
        self.on_map: Callable = lambda tokens: None  # called with each forward's map
        self.on_routed: Callable = lambda index, numbers: None  # called with the map of an experts' rows
        self.before_decode: Callable = lambda: None  # called once a step, before its map is used

    def put(self, tokens) -> None:
        """Set the map of the forward that begins."""
        self.tokens, self.elsewhere = tokens, {}
        if tokens is not None:
            self.on_map(tokens)

    def arguments(self, index: int, routed: Routed | None) -> tuple:
        """The op's, for an MLP of the forward that runs. Where there are experts, each number stands for as many, one an expert."""
        if self.tokens is None:
            return NO_ARGUMENTS
        numbers, device = self.tokens, (own := self.held.at(index))[0].device
        if numbers.device != device:
            if device not in self.elsewhere:
                self.elsewhere[device] = numbers.to(device)
            numbers = self.elsewhere[device]
        if routed:
            if len(numbers) != routed.tokens:
                raise RuntimeError(f"{routed.tokens} tokens were routed to experts, of {len(numbers)}: not supported")
            first, numbers = self.none + 1, numbers[routed.token]
            numbers = torch.where(numbers > self.none, (numbers - first) * routed.experts + routed.expert + first, self.none).int()
            self.on_routed(index, numbers)
        return (numbers, *own, *self.shared.get(device, ()))

    def assign(self, rows) -> None:
        """Set the number of each prompt, from the next generate() or forward on."""
        if rows is not None:
            given, last = rows.tolist() if torch.is_tensor(rows) else rows, self.none + self.choices
            try:
                rows = torch.as_tensor(rows)
                whole = not rows.is_floating_point() and rows.dtype != torch.bool
                fine = rows.dim() == 1 and (not len(rows) or whole and self.none <= int(rows.min()) <= int(rows.max()) <= last)
            except (TypeError, ValueError, RuntimeError):  # no tensor can be made of it
                fine = False
            if not fine:
                raise UserError(f"rows: expected a whole number from {self.none} to {last} for each prompt, got {given!r}")
            rows = rows.to(torch.int32)
        self.rows, self.spread = rows, {}  # spread: by batch, what of() found

    def of(self, batch: int, prompts: int, device):
        """int32 (batch): beams and several returned sequences stay within their prompt."""
        if (batch, prompts, device) not in self.spread:
            first, rows = self.none + 1, self.rows
            if rows is None:
                rows = torch.full((prompts,), first) if self.choices == 1 else torch.arange(first, first + self.choices)
            if len(rows) != prompts:
                raise UserError(f"rows: expected one for each of the {prompts} prompts, got {len(rows)}")
            self.spread[batch, prompts, device] = rows.to(device, torch.int32).repeat_interleave(batch // prompts)
        return self.spread[batch, prompts, device]

    def buffer(self, size: int, device):
        if (size, device) not in self.buffers:
            with torch.inference_mode(False):  # it is written in whatever mode comes
                self.buffers[size, device] = torch.full((size,), self.none, dtype=torch.int32, device=device)
            torch._dynamo.mark_static_address(self.buffers[size, device])
        return self.buffers[size, device]


class Follow(StoppingCriteria):
    """Stops where the user's criteria do, and tells the patch of each step. Needs no synchronisation with the device."""

    def __init__(self, patch: "Patch", ends, criteria: list[StoppingCriteria]):
        self.patch, self.ends, self.criteria = patch, ends, criteria
        self.nobody = torch.zeros(0, dtype=torch.bool)

    def __getattr__(self, name):
        """generate() looks at what its criteria have: eos_token_id, say."""
        return getattr(next((criterion for criterion in self.__dict__["criteria"] if hasattr(criterion, name)), None), name)

    def __call__(self, input_ids, scores, **kwargs):
        if len(self.nobody) != len(input_ids):  # kept: a GPU waits for each kernel that is launched between two forwards
            self.nobody = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        done = self.nobody
        for criterion in self.criteria:  # whatever form a verdict has; not |=, which would write to what is kept
            done = done | torch.as_tensor(criterion(input_ids, scores, **kwargs), dtype=torch.bool, device=input_ids.device)
        self.patch.step(input_ids, self.ends, done if self.criteria else None)
        return done


class Patch:
    """The one record of a patched model, shared by what is active on it, "steered" or "observed", in any order. While generate()
    runs, phase is "prompt" until the first token is chosen, then "decode"; outside it is None."""

    def __init__(self, model):
        self.model, self.decoder, self.mlps = model, decoder_of(model), find_mlps(model)
        self.active: dict[str, Rows] = {}
        self.phase, self.mask, self.ended = None, None, None  # mask: of the prompt
        self.batch, self.left, self.warned = 0, 0, False  # left: tokens a row that are to be read until the next one is chosen
        self.generating, self.thread = threading.Lock(), None

    def __deepcopy__(self, memo):
        raise UserError("a model can't be copied while it is steered or observed: leave that first")

    def put_on(self, what: str, rows: Rows) -> None:
        if what in self.active:
            raise UserError(f"the model is {what} already: leave that first, or put both into one")
        if not self.active:
            with contextlib.ExitStack() as undo:  # where it fails halfway, that half is undone
                self.attach(undo)
                self.undo = undo.pop_all()
        self.active[what] = rows

    def take_off(self, what: str) -> None:
        with PATCHING:
            self.active.pop(what).put(None)  # what still has these rows, a hook, say, finds no token in them
            if not self.active:
                self.undo.close()

    def leave(self, what: str) -> None:
        """Take off once no other thread is in generate(): an answer that one has begun, for a streamer, say, ends as it began."""
        waited = False
        try:
            if self.thread != threading.get_ident():  # else it is left by a callback of its own generate()
                waited = self.generating.acquire()
        finally:
            self.take_off(what)
            if waited:
                self.generating.release()

    def attach(self, undo: contextlib.ExitStack) -> None:
        forget_compiled = functools.partial(self.model.__dict__.pop, "_compiled_call", None)
        undo.callback(forget_compiled)  # generate()'s, which would go on with the old forwards
        replace(undo, self.model, "_neurons_patch", self)
        number = min(set(range(len(ARGUMENTS) + 1)) - set(ARGUMENTS))  # 0 again for the next patch: compiled code knows it
        ARGUMENTS[number] = self.arguments
        undo.callback(ARGUMENTS.pop, number)
        for index, mlp in enumerate(self.mlps):
            if vars(mlp.module).get("_neurons_patch", self) is not self:
                raise UserError("a part of this model, or what it is part of, is steered or observed: name one model to both")
            replace(undo, mlp.module, "_neurons_patch", self)
            forward = through_op(mlp, index, number)
            compare(mlp, functools.partial(run_as, mlp.module, forward))
            replace_forward(undo, mlp.module, forward)
        if hasattr(self.model, "generate"):
            replace(undo, self.model, "generate", self.followed(self.model.generate))
        for name in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
            if hasattr(self.model, name):
                replace(undo, self.model, name, refuse_batching)
        undo.callback(self.decoder.register_forward_pre_hook(self.before_forward, with_kwargs=True).remove)
        forget_compiled()

    def arguments(self, index: int, routed: Routed | None) -> tuple:
        """The op's arguments after act, for an MLP of the forward that runs."""
        steering, observing = self.active.get("steered"), self.active.get("observed")
        edits = NO_ARGUMENTS if steering is None else steering.arguments(index, routed)
        return edits + (NO_ARGUMENTS if observing is None else observing.arguments(index, routed))

    def before_forward(self, module, args, kwargs) -> None:
        """Make the token maps: once a forward, shared by all layers."""
        ids = args[0] if args else kwargs.get("input_ids")
        ids = ids if ids is not None else kwargs["inputs_embeds"]
        self.batch, tokens = ids.shape[:2]
        self.check_caller(tokens)
        for rows in self.active.values():
            rows.put(self.map(rows, self.batch, tokens, ids.device, kwargs))

    def check_caller(self, tokens: int) -> None:
        """Raise for forwards that would be taken for what they are not."""
        if torch.compiler.is_compiling():  # there are no frames to look at
            return
        if self.phase is None:
            if inside_generate(self.model):
                raise UserError("this generate() was taken from the model before it was steered or observed: call model.generate() "
                                "anew")
        elif self.thread != threading.get_ident():
            raise UserError("another thread is in generate() of this model: while it is steered or observed, one at a time")
        elif self.left <= 0:
            raise UserError("the model was called inside its own generate(), by a stopping criterion or a logits processor: not "
                            "supported while steering or observing")
        self.left -= tokens

    def map(self, rows: Rows, batch: int, tokens: int, device, kwargs):
        """int32 (batch * tokens), or None: nothing of this forward is mapped."""
        if callable(rows.where):
            return rows.where(batch, tokens)
        if self.phase == "decode":
            if tokens != 1:
                raise RuntimeError(f"expected one token a row and step, got {tokens}: this way of decoding is not supported")
            return rows.buffer(batch, device)
        mask, prompts = kwargs.get("attention_mask"), batch
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
            start, prompts = cached(kwargs), len(self.mask)
            mask = self.mask[:, start:start + tokens].repeat_interleave(batch // prompts, 0)
        elif mask is None:
            mask = torch.ones((batch, tokens), dtype=torch.bool, device=device)
        elif mask.dim() != 2:
            raise UserError(f"attention_mask: expected (rows, tokens) while steering or observing, got shape {tuple(mask.shape)}")
        return torch.where(mask[:, -tokens:].bool(), rows.of(batch, prompts, device)[:, None], rows.none).to(torch.int32).flatten()

    def followed(self, original):
        """model.generate, so that it tells prompt from decode and which rows have ended."""
        names = list(inspect.signature(original).parameters)

        def generate(*args, **kwargs):
            kwargs |= zip(names, args)
            option = functools.partial(option_of, self.model, kwargs)
            refuse_mixing(option)
            mask, ends = prompt_of(kwargs, option)
            criteria = list(kwargs.pop("stopping_criteria", None) or [])
            if option("stop_strings") and kwargs.get("tokenizer") is not None:
                criteria.append(StopStringCriteria(kwargs["tokenizer"], option("stop_strings")))
            lengths = [criterion for criterion in criteria if isinstance(criterion, MaxLengthCriteria)]  # generate() looks for them
            follow = Follow(self, ends, [criterion for criterion in criteria if criterion not in lengths])
            if not self.generating.acquire(blocking=self.thread is None):  # None: of one who leaves, for a moment
                raise UserError("generate() of this model is running already: while it is steered or observed, one at a time")
            try:
                self.phase, self.mask, self.thread = "prompt", mask, threading.get_ident()
                self.left = mask.shape[1] - cached(kwargs)
                return original(**kwargs, stopping_criteria=StoppingCriteriaList([*lengths, follow]))
            finally:
                self.phase = self.mask = self.ended = self.thread = None
                self.generating.release()

        return generate

    def step(self, input_ids, ends, done) -> None:
        """A token was chosen for every row: what follows is decode, without the rows that have ended. done: bool (rows), of the
        user's criteria, or None where there are none."""
        batch, latest = self.batch, input_ids[:, -1]  # batch: of the last forward, and so of the next
        self.left = 1
        if self.ended is None:
            self.phase, self.ended = "decode", torch.zeros(batch, dtype=torch.bool, device=latest.device)
        if len(latest) == batch:  # beam search asks about more candidates than it goes on with, of which none has ended
            ended = torch.isin(latest, ends)
            self.ended |= ended if done is None else ended | done
        for rows in self.active.values():
            numbers = rows.of(batch, len(self.mask), latest.device)
            rows.buffer(batch, latest.device).copy_(numbers).masked_fill_(self.ended, rows.none)
            rows.before_decode()


def replace(undo: contextlib.ExitStack, owner, name: str, value) -> None:
    """Set an attribute until undo is closed."""
    old = owner.__dict__.get(name)
    setattr(owner, name, value)
    undo.callback(lambda: setattr(owner, name, old) if old is not None else delattr(owner, name))


def replace_forward(undo: contextlib.ExitStack, module, forward) -> None:
    """Of a module that accelerate has wrapped, the forward inside: its own moves what goes in and comes out."""
    replace(undo, module, "_old_forward" if hasattr(module, "_old_forward") else "forward", forward)


def run_as(module, forward, *arguments):
    """What a module gives with another forward; around that is accelerate's, where it has wrapped the module."""
    with contextlib.ExitStack() as undo:
        replace_forward(undo, module, forward)
        return module.forward(*arguments)


@contextlib.contextmanager
def patched(model, what: str, rows: Rows):
    """Have the model "steered" or "observed" meanwhile; the first puts the patch on, the last takes it off."""
    # of a wrapper (a PeftModel, say) the module inside whose generate() it is: there both ways to call it meet
    model = next((module for module in model.modules() if isinstance(module, GenerationMixin)), model)
    with PATCHING:
        patch = model.__dict__.get("_neurons_patch") or Patch(model)
        patch.put_on(what, rows)
    try:
        yield
    except BaseException:  # who is thrown out, or interrupted, waits for nobody
        patch.take_off(what)
        raise
    patch.leave(what)
