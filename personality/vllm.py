"""Personalities inside vLLM: a plug-in that sets each request's neurons in the batches that vLLM forms.

    VLLM_PLUGINS=personality vllm serve MODEL --additional-config '{"personality": {"neurons": "neurons/"}}'
    client.chat.completions.create(..., extra_body={"vllm_xargs": {"personality": "extraversion=1,neuroticism=-0.5"}})

vLLM finds register() by the entry point vllm.general_plugins, and calls it in each of its processes. What is put in its way there:
- where requests come in (InputProcessor): a personality is read, and refused by name where it makes no sense;
- where the keys and values of a prompt are looked up (generate_block_hash_extra_keys): those of edited tokens are their profile's;
- in each worker: the MLPs' activations go through the op, and before each forward the profile of each of its tokens is written,
  for Model Runner V1 in _prepare_inputs, for V2 by a ModelState. Tables and map keep their addresses, so captured graphs read them.
"""

import functools
import json
import re
import threading
from dataclasses import asdict, replace

import torch

from .api import as_character
from .inflight import EDITS, SHARE
from .methods import Character
from .load import mapped_model
from .mlp import find_mlps, shape_of
from .op import check_cuda
from .people import People
from .places import Activation, Batches, Table, compare, cut
from .steer import Profile
from .store import parse_json
from .terminal import EDIT_RULES, Flags, UserError, edit_arguments, positive, refuse

NAME = "personality"  # of the plug-in, of its part of the configuration, of what a request asks for
PROFILES = 256  # that there is room for, at least


# ------------------------------------------------------------------------------------------------------------- settings


def settings_of(config):
    """What --additional-config says about personalities, or None where it says nothing: the flags of induce.py --serve that are
    about edits, and profiles."""
    given = config.additional_config.get(NAME) if isinstance(config.additional_config, dict) else None
    if given is None:
        return None
    if not isinstance(given, dict):
        raise UserError(f'--additional-config: personality: expected {{"neurons": FOLDER}}, got {given!r}')
    flags, seats = Flags("", "--additional-config, personality"), config.scheduler_config.max_num_seqs
    edit_arguments(flags)
    flags.add_argument("--characters")
    flags.add_argument("--profiles", type=positive, default=max(PROFILES, seats))
    flags.set_defaults(frame="none")  # clients write the prompts
    args = flags.parse_args([f"--{key.replace('_', '-')}={value}" for key, value in given.items()])
    refuse(args, EDIT_RULES)
    if args.profiles < seats:  # so a step never needs more profiles than there is room for, and no request has to wait for it
        raise UserError(f"personality: profiles: expected at least --max-num-seqs, {seats}, got {args.profiles}")
    return args


def check_supported(config) -> None:
    """Raise for what mixes tokens in ways that the map can't follow, or leaves the MLP's activation out."""
    model, parallel = config.model_config, config.parallel_config
    for applies, what in (
            (config.device_config.device_type not in ("cpu", "cuda"), f"the device {config.device_config.device_type} is"),
            (config.speculative_config is not None, "speculative decoding is"),
            (config.lora_config is not None, "LoRA is"),
            (model.is_moe, "mixtures of experts are"),
            (model.quantization is not None, f"quantised layers ({model.quantization}) are"),
            (model.runner_type != "generate", f"--runner {model.runner_type} is"),
            (config.kv_transfer_config is not None, "KV transfer, whose stores don't tell personalities apart, is"),
            (config.cache_config.kv_sharing_fast_prefill, "--kv-sharing-fast-prefill is"),
            (parallel.use_ubatching, "dual batch overlap is"),
            (parallel.prefill_context_parallel_size > 1, "prefill context parallelism is")):
        if applies:
            raise UserError(f"{model.model}: {what} not supported by the plug-in personality: leave it out, or start vLLM with "
                            "VLLM_PLUGINS= and without personality in --additional-config")


class Served(People):
    """The personalities that can be asked for. config: vLLM's."""

    def __init__(self, config):
        check_supported(config)
        super().__init__(settings_of(config))
        self.frame, self.lock = None, threading.Lock()  # vLLM reads requests in several threads
        self.take(mapped_model(config.model_config.model, config.model_config.revision, config.load_config.download_dir), None)
        self.depth, self.width = shape_of(find_mlps(self.neurons.model))
        self.most = max(EDITS, int(SHARE * self.depth * self.width))

    def read(self, given) -> str:
        """What a request asks for, in the one form in which the engine passes it on; empty: no edits."""
        if not isinstance(given, str) or not given.strip():
            raise UserError(f"personality: expected a text, got {given!r}")
        character = as_character(parse_json(given, "personality") if given.lstrip().startswith("{") else given, self.characters)
        if character.method == "activation":
            raise UserError("personality: activation addition is of the residual stream, which vLLM's plug-in leaves alone: "
                            "expected trained, npti or dpn-le")
        strengths = {trait: strength for trait, strength in sorted(character.strengths.items()) if strength}
        character = replace(character, strengths=strengths, name="")
        with self.lock:
            edits = len(self.of(character)[0])  # built here as well: what can't be built is refused
        if not edits:
            return ""
        return json.dumps({**asdict(character), "where": self.args.where}, sort_keys=True)

    def profile(self, text: str) -> Profile:
        """Of what read() gave."""
        values = json.loads(text)
        values.pop("where")
        return self.of(Character(**values))[0]


def asked(params) -> str | None:
    """What read() gave, of vLLM's SamplingParams."""
    return (getattr(params, "extra_args", None) or {}).get(NAME)


# ----------------------------------------------------------------------------------------------------------- in a worker


def find_activations(model, layers: range) -> list[tuple]:
    """(MLP, the name of its activation, the op's number of it) of each of these layers, of vLLM's modules."""
    from vllm.model_executor.layers.activation import GeluAndMul, SiluAndMul

    model = model.get_language_model() if hasattr(model, "get_language_model") else model
    kind, found = type(model).__name__, {}
    for path, module in model.named_modules():
        if re.search("MoE|Experts", type(module).__name__):
            raise UserError(f"{kind}: {path} is a {type(module).__name__}: mixtures of experts are not supported")
        for name, child in module.named_children():
            if type(child) in (SiluAndMul, GeluAndMul) and hasattr(module, "down_proj"):
                act = {"none": 1, "tanh": 2}[child.approximate] if type(child) is GeluAndMul else 0
                found.setdefault(int(next(iter(re.findall(r"\.(\d+)\.", f"{path}.")), -1)), []).append((module, name, act))
    if {number: len(here) for number, here in found.items()} != dict.fromkeys(layers, 1):
        raise UserError(f"{kind}: expected a plain gated MLP with SiluAndMul or GeluAndMul in each of the layers {layers.start} to "
                        f"{layers.stop - 1}, found {({number: len(here) for number, here in sorted(found.items())})}")
    return [found[number][0] for number in layers]


def steer_modules(config, model, device) -> Batches:
    """Put the op into the MLPs of vLLM's modules."""
    if torch.device(device).type == "cuda":
        check_cuda(device)
    people, layers = Served(config), range(*config.model_config.get_layers_start_end_indices(config.parallel_config))
    activations, first = find_activations(model, layers), 0
    width = activations[0][0].down_proj.input_size_per_partition
    if width < people.width:  # the others are on other ranks
        from vllm.distributed import get_tensor_model_parallel_rank

        first = width * get_tensor_model_parallel_rank()
    with torch.inference_mode(False):
        table = Table(people.args.profiles, people.most, len(layers), width, device)
        tokens = torch.zeros(config.scheduler_config.max_num_batched_tokens, dtype=torch.int32, device=device)
    for ptr, (mlp, name, act) in zip(table.ptr, activations):
        ours = Activation(act, tokens, ptr, table.index, table.value)
        compare(getattr(mlp, name), ours, width, device, config.model_config.dtype)
        setattr(mlp, name, ours)
    return Batches(table, lambda text: cut(people.profile(text), layers, range(first, first + width)), tokens, people.args.where)


# ------------------------------------------------------------------------------------------------- what vLLM calls instead


def instead(owner, name: str, make) -> None:
    """Put make(original) in the place of a function of vLLM's, once: register() can be called again."""
    original = getattr(owner, name)
    if not getattr(original, NAME, False):
        ours = functools.wraps(original)(make(original))
        setattr(ours, NAME, True)
        setattr(owner, name, ours)


def with_people(original):
    """InputProcessor.__init__"""
    def init(self, vllm_config, *args, **kwargs):
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.entrypoints.openai.completion.protocol import CompletionRequest

        self.personality = Served(vllm_config) if settings_of(vllm_config) else None
        for kind in (ChatCompletionRequest, CompletionRequest):
            instead(kind, "to_sampling_params", functools.partial(with_check, self))
            instead(kind, "to_beam_search_params", without_personality)
        original(self, vllm_config, *args, **kwargs)

    return init


def with_check(inputs, original):
    """to_sampling_params of OpenAI's requests, so that what makes no sense is refused before a stream has begun"""
    def to_sampling_params(self, *args, **kwargs):
        if NAME in (self.vllm_xargs or {}):
            read(inputs, self.vllm_xargs[NAME])
        return original(self, *args, **kwargs)

    return to_sampling_params


def without_personality(original):
    """to_beam_search_params of OpenAI's requests, which passes over what vllm_xargs ask for"""
    def to_beam_search_params(self, *args, **kwargs):
        if NAME in (self.vllm_xargs or {}):
            raise refusal("personality: not supported with use_beam_search")
        return original(self, *args, **kwargs)

    return to_beam_search_params


def refusal(words):
    """What vLLM's server answers with HTTP 400."""
    from vllm.exceptions import VLLMValidationError

    return VLLMValidationError(" ".join(str(words).split()))


def read(inputs, given) -> str:
    """What Served.read() makes of it. inputs: vLLM's InputProcessor."""
    if inputs.personality is None:
        raise refusal("personality: this server has no neuron files: vllm serve --additional-config "
                      '\'{"personality": {"neurons": FOLDER}}\'')
    try:
        return inputs.personality.read(given)
    except UserError as error:
        raise refusal(error) from None


def with_personality(original):
    """InputProcessor.process_inputs"""
    def process_inputs(self, request_id, prompt, params, *args, **kwargs):
        given = asked(params)
        if given is None:
            return original(self, request_id, prompt, params, *args, **kwargs)
        if kwargs.get("resumable"):
            raise refusal("personality: a session whose prompt grows is not supported: its answers become its prompt")
        text = read(self, given)
        request = original(self, request_id, prompt, params, *args, **kwargs)
        more = {key: value for key, value in params.extra_args.items() if key != NAME}
        request.sampling_params.extra_args = {**more, **({NAME: text} if text else {})}
        return request

    return process_inputs


def with_profile(original):
    """generate_block_hash_extra_keys. A block of keys and values that holds edited tokens is found by its profile and by where in
    it they begin, one that holds none is everybody's; what follows a block has its hash in its own."""
    def extra_keys(request, start_token_idx, end_token_idx, start_mm_idx):
        keys, start_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
        text = asked(request.sampling_params)
        if text:
            edited = max(start_token_idx, request.num_prompt_tokens if json.loads(text)["where"] == "generated" else 0)
            if edited < end_token_idx:
                keys = (*(keys or ()), (NAME, f"{text} from {edited - start_token_idx}"))
        return keys, start_mm_idx

    return extra_keys


def with_runner(original):
    """WorkerBase.__init__, in a worker, where vLLM's runners may be imported"""
    def init(self, vllm_config, *args, **kwargs):
        original(self, vllm_config, *args, **kwargs)
        if not settings_of(vllm_config):
            return
        if vllm_config.use_v2_model_runner:
            from vllm.v1.worker.gpu import model_states

            return instead(model_states, "resolve_model_state_cls", with_state)
        if vllm_config.device_config.device_type == "cpu":
            from vllm.v1.worker.cpu_model_runner import CPUModelRunner as Runner
        else:
            from vllm.v1.worker.gpu_model_runner import GPUModelRunner as Runner
        instead(Runner, "_prepare_inputs", with_map)
        instead(Runner, "load_model", with_op)

    return init


def with_op(original):
    """load_model of a Model Runner V1; it is compiled later"""
    def load_model(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.personality = steer_modules(self.vllm_config, self.get_model(), self.device)

    return load_model


def with_map(original):
    """GPUModelRunner._prepare_inputs, which runs before each forward of requests"""
    def prepare_inputs(self, scheduler_output, num_scheduled_tokens):
        batch = self.input_batch
        texts = [asked(self.requests[name].sampling_params) for name in batch.req_ids]
        self.personality.before_forward(zip(texts, batch.num_prompt_tokens.tolist(), batch.num_computed_tokens_cpu.tolist(),
                                            num_scheduled_tokens.tolist()))
        return original(self, scheduler_output, num_scheduled_tokens)

    return prepare_inputs


def with_state(original):
    """resolve_model_state_cls of Model Runner V2"""
    def resolve_model_state_cls(vllm_config, model):
        from vllm.v1.worker.gpu.model_states.default import DefaultModelState

        state = original(vllm_config, model)
        if state is not DefaultModelState:
            raise UserError(f"{type(model).__name__}: a model with a {state.__name__} is not supported by the plug-in personality")
        return steered_state(state)

    return resolve_model_state_cls


@functools.cache
def steered_state(state):
    """The subclass of Model Runner V2's DefaultModelState that writes the map."""
    class SteeredState(state):
        def __init__(self, vllm_config, model, encoder_cache, device):
            super().__init__(vllm_config, model, encoder_cache, device)
            self.personality = steer_modules(vllm_config, model, device)
            self.asked = {}  # by request: (what read() gave or None, tokens of the prompt)

        def add_request(self, req_index, new_req_data):
            super().add_request(req_index, new_req_data)
            self.asked[new_req_data.req_id] = asked(new_req_data.sampling_params), new_req_data.prompt_len

        def remove_request(self, req_id):
            super().remove_request(req_id)
            self.asked.pop(req_id, None)

        def prepare_inputs(self, input_batch, req_states):
            nobody = None, 0  # whom a batch is made up of that only warms up, or is captured
            self.personality.before_forward(
                (*self.asked.get(name, nobody), done, new) for name, done, new in zip(
                    input_batch.req_ids, input_batch.num_computed_tokens_np.tolist(), input_batch.num_scheduled_tokens.tolist()))
            return super().prepare_inputs(input_batch, req_states)

    return SteeredState


def register() -> None:
    """What vLLM calls, in each of its processes, and perhaps again."""
    from vllm.v1.core import block_pool, kv_cache_utils
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.worker_base import WorkerBase

    instead(InputProcessor, "__init__", with_people)
    instead(InputProcessor, "process_inputs", with_personality)
    for module in (kv_cache_utils, block_pool):
        instead(module, "generate_block_hash_extra_keys", with_profile)
    instead(WorkerBase, "__init__", with_runner)
