"""Requests of different personalities in one batch: they join and leave it between any two tokens.

transformers' continuous batching schedules the requests and keeps their keys and values. Here each token of a batch gets the
profile of the request that it belongs to, and each request the sampling that it asked for.
"""

import asyncio
import atexit
import contextlib
import inspect
import itertools
import os
import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
import transformers
from transformers import GenerationConfig
from transformers.generation import configuration_utils

from .attention import attending_by_row
from .mlp import find_mlps
from .model import TEST_PENALTY, end_tokens
from .places import Places
from .steer import Profile, steer
from .terminal import UserError

EDITS, SHARE = 4096, 0.05  # room for a profile: so many edits, or this share of the model's neurons
TOGETHER = 1024  # tokens that one step reads at most: longer prompts take several
PAGE, CACHE_BYTES = 256, 2 << 30  # tokens of a block of the cache; bytes of keys and values on a CPU (on a GPU: what is free)
FIRST = 1024  # tokens among which top_p looks first


@dataclass
class Sampling:
    """How a request's tokens are chosen; temperature 0 is greedy. The penalties are OpenAI's, and generate()'s of repetition.
    top_logprobs: alternatives whose log-probabilities are kept beside each token's, or None for neither."""

    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = TEST_PENALTY
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    top_logprobs: int | None = None


@dataclass
class Request:
    """ids: the prompt's. profile: None for the unedited model; requests with the same object share its place in the tables.
    logprobs: filled as tokens come, a tuple for each: its log-probability, and pairs of a token and its log-probability."""

    ids: list[int]
    sampling: Sampling
    profile: Profile | None = None
    max_new_tokens: int = 64
    logprobs: list = field(default_factory=list)
    generator: torch.Generator | None = None


# ------------------------------------------------------------------------------------------------------------- sampling


def penalised(scores, request: Request, prompt: list[int], answer: list[int]):
    """A row of scores (vocabulary) after the request's penalties; prompt, answer: the ids so far."""
    how = request.sampling
    if how.repetition_penalty != 1 and (prompt or answer):
        ids = torch.tensor(prompt + answer, device=scores.device)
        seen = scores[ids]
        scores = scores.index_put((ids,), torch.where(seen < 0, seen * how.repetition_penalty, seen / how.repetition_penalty))
    if answer and (how.frequency_penalty or how.presence_penalty):
        ids, counts = torch.tensor(answer, device=scores.device).unique(return_counts=True)
        scores = scores.index_add(0, ids, -(how.presence_penalty + how.frequency_penalty * counts).to(scores.dtype))
    return scores


def nucleus(scores, top_p: float):
    """The scores of the likeliest tokens whose probabilities reach top_p, -inf for the others."""
    for most in (min(FIRST, len(scores)), len(scores)):  # sorting the whole vocabulary takes milliseconds a row
        best, at = scores.topk(most)
        share = (best - scores.logsumexp(0)).exp().cumsum(0)
        if float(share[-1]) >= top_p:
            break
    kept = 1 + int((share[:-1] < top_p).sum())
    return torch.full_like(scores, -torch.inf).index_copy(0, at[:kept], best[:kept])


def chosen(scores, request: Request) -> int:
    """A token from a row of scores (vocabulary)."""
    how = request.sampling
    if how.temperature < 1e-5:
        return int(scores.argmax())
    scores = scores / how.temperature
    if how.top_p < 1:
        scores = nucleus(scores, how.top_p)
    if request.generator is None:
        request.generator = torch.Generator(scores.device)
        request.generator.manual_seed(how.seed) if how.seed is not None else request.generator.seed()
    noise = torch.empty_like(scores).exponential_(generator=request.generator)  # dividing by it draws as multinomial() does
    return int((scores.softmax(-1) / noise).argmax())


class Sampler:
    """Stands where continuous batching has its logits processors: it chooses each row's token, and scores that one highest."""

    do_processing, tensors_required, supported_keys, ignored_keys = True, 0, {}, frozenset()

    def __init__(self, requests: dict[str, Request]):
        self.requests, self.states = requests, []

    def check_kwargs(self, kwargs) -> None:
        pass

    def fill_defaults(self, tensor) -> None:
        pass

    def prepare_tensor_args(self, requests_in_batch, arg_storage):
        self.states = [future.state for future in requests_in_batch if future.has_new_token]
        return arg_storage

    def __call__(self, input_ids, scores, args):
        result = torch.full_like(scores, -torch.inf)
        for row, state in enumerate(self.states):
            result[row, self.choose(scores[row], state)] = 0
        return result

    def choose(self, scores, state) -> int:
        request = self.requests.get(state.request_id)
        if request is None:  # cancelled: nobody reads it
            return 0
        answer = (state.initial_tokens + state.generated_tokens)[len(request.ids):]
        token = chosen(penalised(scores, request, request.ids, answer), request)
        if request.sampling.top_logprobs is not None:
            every = scores.log_softmax(-1)
            best, ids = every.topk(request.sampling.top_logprobs)
            request.logprobs.append((float(every[token]), list(zip(ids.tolist(), best.tolist()))))
        return token


# --------------------------------------------------------------------------------------------------------------- engine


def cache_blocks(model, rows: int) -> int | None:
    """Blocks of PAGE tokens that the keys and values of a CPU's cache get: enough for all rows at the model's longest, at most
    CACHE_BYTES. On a GPU None: what is free."""
    if model.device.type != "cpu":
        return None
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize
    longest = getattr(config, "max_position_embeddings", None) or 4096
    return max(4, min(rows * -(-longest // PAGE), CACHE_BYTES // (token * PAGE)))


class EngineStopped(UserError):
    """Nobody is there any more who would do it."""


class Engine:
    """Writes for many requests at once, until it is stopped. load(): the model and its tokenizer; rows: requests of a batch; where:
    "generated" or "all", as in steer().

    All of it runs in one thread of its own, loading too, and what else needs torch is given to between(): OpenMP keeps a team of
    threads for each thread that computes, and with more threads than cores every loop begins by waking them (half the speed)."""

    def __init__(self, load, rows: int = 32, where: str = "generated"):
        self.load, self.rows, self.where = load, rows, where
        self.requests: dict[str, Request] = {}  # that are waiting or being written
        self.listeners: dict[str, tuple] = {}  # of each, the event loop and the queue where its tokens are awaited
        self.places, self.map, self.count, self.jobs = Places(rows), None, itertools.count(), queue.SimpleQueue()
        self.steps = self.tokens = 0
        self.over = self.stopping = False
        self.ended = lambda: None  # called in its thread when it has stopped, for whatever reason
        self.profiles, ready = [Profile.empty()] * rows, Future()
        self.thread = threading.Thread(target=self.work, args=(ready,), name="engine", daemon=True)
        try:
            self.thread.start()
            ready.result()
        except KeyboardInterrupt:  # the thread goes on loading, and Python that ends under it would abort the process
            atexit.register(os._exit, 130)
            raise

    def work(self, ready: Future) -> None:
        with contextlib.ExitStack() as undo:
            try:
                self.model, self.tokenizer = self.load()
                self.manager = self.managed()
                undo.enter_context(attending_by_row(self.model, self.manager.batch_processor.cache))
                self.most = max(EDITS, int(SHARE * sum(mlp.neurons for mlp in find_mlps(self.model))))
                room = steer(self.model, self.profiles, where=self.whose, capacity=self.rows * self.most)
                self.steering = undo.enter_context(room)
            except BaseException as error:
                return ready.set_exception(error)
            self.manager._generation_thread = threading.current_thread()
            loop = self.manager._run_generation_loop
            mode = {"use_inference_mode": False} if "use_inference_mode" in inspect.signature(loop).parameters else {}  # since 5.24
            ready.set_result(None)
            try:
                loop(**mode)
            except Exception as error:  # it catches its own; this is another version's
                self.manager._handle_critical_error(error, self.manager.batch_processor)
        self.over = True  # before it looks for jobs the last time: who brings one later sees it
        self.refuse_jobs()
        for loop, grown in list(self.listeners.values()):  # transformers forgets who came just before it was to stop
            with contextlib.suppress(RuntimeError):  # the event loop has ended, too
                loop.call_soon_threadsafe(grown.put_nowait, None)
        self.ended()

    def refuse_jobs(self) -> None:
        """Tell those whose work nobody will do any more."""
        with contextlib.suppress(queue.Empty):
            while True:
                _, result = self.jobs.get_nowait()
                if result.set_running_or_notify_cancel():
                    result.set_exception(EngineStopped("the engine has stopped"))

    def managed(self):
        """transformers' manager of continuous batching, with the sampler and the steps' hooks in it; its loop is not begun."""
        fields = getattr(configuration_utils.ContinuousBatchingConfig, "__dataclass_fields__", ())
        if not hasattr(self.model, "init_continuous_batching") or "page_size" not in fields:
            raise UserError(f"{type(self.model).__name__}: transformers {transformers.__version__} has no continuous batching that "
                            "the server knows: 5.19 to 5.24 have")
        if getattr(self.model.config.get_text_config(), "kv_lora_rank", None):
            raise UserError(f"{type(self.model).__name__}: transformers' continuous batching has no cache for latent attention: "
                            "this model can't be served")
        ends = end_tokens(self.model)
        options = GenerationConfig(do_sample=False, max_new_tokens=1, eos_token_id=ends or -1,
                                   pad_token_id=self.tokenizer.pad_token_id)
        config = configuration_utils.ContinuousBatchingConfig(
            page_size=PAGE, num_blocks=cache_blocks(self.model, self.rows), max_batch_tokens=max(TOGETHER, self.rows),
            max_requests_per_batch=self.rows, use_cuda_graph=False, use_async_batching=False, auto_switch_to_flash=False,
            allow_block_sharing=False)  # an answer's keys are those of one personality
        sampler = Sampler(self.requests)
        try:  # transformers' own code, and its inner names
            manager = self.model.init_continuous_batching(generation_config=options, continuous_batching_config=config)
            manager.logit_processor = sampler
            manager.batch_processor = processor = manager._create_batch_processor()
            inputs, scheduler, router = processor.inputs_and_outputs, processor.scheduler, manager.output_router
            begin, prepare = processor.prepare_next_batch, inputs.prepare_batch_tensors
            self.longest = (manager.continuous_batching_config.num_blocks - 1) * PAGE  # tokens of a request that the cache can hold
        # of a version that lacks such a name, or of a configuration that its cache can't read
        except (AttributeError, TypeError, ValueError, NotImplementedError, KeyError) as error:
            raise UserError(f"continuous batching of transformers {transformers.__version__} can't serve "
                            f"{type(self.model).__name__}: {error}") from error
        processor.prepare_next_batch, inputs.prepare_batch_tensors = self.between_steps(begin, scheduler), self.before_step(prepare)
        router.output_queue = SimpleNamespace(put=lambda output: None)  # of those that nobody awaits any more
        return manager

    def between_steps(self, prepare_next_batch, scheduler):
        """Do the work of between() first, then go on."""
        def prepare():
            while True:
                with contextlib.suppress(queue.Empty):
                    work, result = self.jobs.get_nowait()
                    self.map = None
                    if not result.set_running_or_notify_cancel():  # who asked has gone
                        continue
                    try:
                        with torch.no_grad():
                            result.set_result(work())
                    except Exception as error:
                        result.set_exception(error)
                    continue
                # set where the cache is full, and else only cleared when a request finishes, not when it is cancelled
                scheduler.block_new_requests &= bool(scheduler.active_requests)
                return prepare_next_batch()

        return prepare

    def before_step(self, prepare_batch_tensors):
        """Say whose each token of the step is, then go on."""
        def prepare(requests_in_batch, *args, **kwargs):
            owners = [self.requests.get(future.state.request_id) for future in requests_in_batch]
            numbers, tokens = self.numbered([owner.profile if owner else None for owner in owners]), []
            for future, owner, number in zip(requests_in_batch, owners, numbers):
                past, new = future.state.position_offset, future.query_length
                plain = min(new, max(0, len(owner.ids) - past)) if owner and self.where == "generated" else 0
                tokens += [0] * plain + [number] * (new - plain)
                self.tokens += bool(future.has_new_token)
            self.map, self.steps = torch.tensor(tokens, dtype=torch.int32, device=self.model.device), self.steps + 1
            return prepare_batch_tensors(requests_in_batch, *args, **kwargs)

        return prepare

    def numbered(self, profiles: list[Profile | None]) -> list[int]:
        """The numbers that a step's profiles have in the tables, 0 for the unedited model."""
        wanted = {id(profile): profile for profile in profiles if profile is not None and (len(profile) or profile.residual)}
        fresh = self.places.seat(wanted)
        for key, place in fresh.items():
            self.profiles[place - 1] = wanted[key]
        if fresh:
            self.steering.update(self.profiles)
        return [self.places.of[id(profile)] if id(profile) in wanted else 0 for profile in profiles]

    def whose(self, batch: int, tokens: int):
        """The map of the forward that runs: of a step, or of a job, which has none."""
        return self.map

    def running(self) -> bool:
        return self.thread.is_alive() and not self.over and self.manager.background_thread_status.fatal_error is None

    async def write(self, request: Request):
        """Yield the answer's ids so far, each time it has grown. Who stops reading frees its row within a step."""
        if not request.ids:
            raise UserError("an empty prompt")  # which would end the engine
        name, grown, going = f"request-{next(self.count)}", asyncio.Queue(), False
        self.requests[name], self.listeners[name] = request, (asyncio.get_running_loop(), grown)
        self.manager.register_result_handler(name, grown.put_nowait)  # of the event loop that runs
        try:
            add = self.manager.add_request
            going = self.running() and add(request.ids, name, request.max_new_tokens, streaming=True) is not None
            if not going:
                raise EngineStopped("the engine has stopped")
            while going:
                output = await grown.get()
                going = output is not None and not output.is_finished()
                if output is None or output.error and self.stopping:
                    raise EngineStopped("the server was stopped" if self.stopping else "the engine has stopped")
                if output.error:
                    raise RuntimeError(output.error)
                yield output.generated_tokens
        finally:
            if going:
                self.manager.cancel_request(name)
            self.manager.output_router.result_handlers.pop(name, None)
            self.requests.pop(name, None)
            self.listeners.pop(name, None)

    async def between(self, work):
        """What work() gives, called between two steps, when the model is nobody's: the forwards in it are unedited."""
        result = Future()
        self.jobs.put((work, result))
        self.manager._wake_up_loop.set()
        if not self.running():
            self.refuse_jobs()
        return await asyncio.wrap_future(result)

    def stop(self) -> None:
        """What is still being written fails; the model is left as it was."""
        self.stopping = True
        if self.running():
            self.manager.background_thread_status.request_stop(self.manager.background_thread_status.HARD_STOP, 0)
            self.manager._wake_up_loop.set()
        self.thread.join()
