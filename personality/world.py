"""The processes that torchrun started: they share the questions, or hold one model together, or both."""

import atexit
import contextlib
import os
import re
import signal
from dataclasses import dataclass
from datetime import timedelta

import torch

from .terminal import UserError, say

WAIT = timedelta(days=7)  # one may wait long for another


@dataclass
class World:
    """This is process rank of size. Each `tp` neighbours hold one model together (tensor parallel) and do the same; such teams
    share the questions. Team 0 has the results, and its first process writes and speaks."""

    rank: int = 0
    size: int = 1
    tp: int = 1
    everyone: object = None  # a group of all processes; torch's default one is the team, since that is what shares the model
    peers: object = None  # a group of those that have the same place in all teams

    @classmethod
    def join(cls, tp: int = 1) -> "World":
        """tp: processes that hold a model together; 0: all."""
        rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
        if not (re.fullmatch("[0-9]{1,9},[0-9]{1,9}", f"{rank},{size}") and int(rank) < int(size) and
                (int(size) == 1 or {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys())):
            raise UserError(f"RANK {rank} of WORLD_SIZE {size}, MASTER_ADDR and MASTER_PORT: expected as torchrun sets them")
        rank, size = int(rank), int(size)
        if tp != 1 and (size == 1 or size % (tp or size)):
            raise UserError(f"--tp{f' {tp}' if tp else ''}: expected to be started by torchrun --nproc-per-node N, N being "
                            f"{f'a multiple of {tp}' if tp else '2 or more'}; got {size}")
        world = cls(rank, size, tp or size)
        if size > 1:
            world.meet()  # before there is a handler: in C++, where a rank may wait for one that never comes, it would not run
            signal.signal(signal.SIGTERM, world.end)
        return world

    def meet(self) -> None:
        """Make the groups, and have them left before Python ends: gloo's threads let go of tensors only after a collective, and one
        that then finds Python gone aborts a process that has done its work."""
        store, _, _ = next(torch.distributed.rendezvous("env://", timeout=WAIT))

        def part(name):
            return torch.distributed.PrefixStore(name, store)

        if self.tp > 1:
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            torch.distributed.init_process_group(backend, store=part(f"team {self.team}"), rank=self.place, world_size=self.tp,
                                                 timeout=WAIT)
        gloo = torch.distributed.ProcessGroupGloo
        self.everyone = gloo(part("everyone"), self.rank, self.size, WAIT)
        self.peers = gloo(part(f"peers {self.place}"), self.team, self.teams, WAIT)
        atexit.register(self.leave)

    def leave(self) -> None:
        """Drop the groups, which waits for their threads."""
        self.everyone = self.peers = None
        if self.tp > 1:
            torch.distributed.destroy_process_group()

    @property
    def team(self) -> int:
        """The number of this process's team."""
        return self.rank // self.tp

    @property
    def place(self) -> int:
        """Of this process in its team."""
        return self.rank % self.tp

    @property
    def teams(self) -> int:
        return self.size // self.tp

    def end(self, *_) -> None:
        """On SIGTERM."""
        with contextlib.suppress(RuntimeError):  # it came while something was being said
            say(self.ended())
        os._exit(143)

    def ended(self) -> str:
        return f"rank {self.rank}: another rank has ended. What was finished is kept: the same command goes on"

    def say(self, text: str) -> None:
        """One process speaks."""
        if not self.rank:
            say(text)

    @contextlib.contextmanager
    def heard(self):
        """What is printed meanwhile is the first process's."""
        with contextlib.ExitStack() as undo:
            if self.rank:
                nowhere = undo.enter_context(open(os.devnull, "w"))
                for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
                    undo.enter_context(redirect(nowhere))
            yield

    def share(self, number: int, step: int) -> range:
        """This team's part of `number` items, in whole steps: what is in a batch shows in the last bits of a forward, so the
        counts are those of one process only if the batches are."""
        steps = -(-number // step)
        return range(*(min(number, steps * k // self.teams * step) for k in (self.team, self.team + 1)))

    def agree(self, value):
        """What the first of the team has: for what hangs on a clock, say, since a team that parts waits for ever."""
        if self.tp == 1:
            return value
        values = [value]
        self.together(torch.distributed.broadcast_object_list, values, 0)
        return values[0]

    def told(self, yes: bool) -> bool:
        """What the first process of all says: of a file, say, that may be another one when the next of them looks."""
        answer = torch.tensor([yes])
        if self.size > 1:
            self.together(lambda: self.everyone.broadcast(answer, 0).wait())
        return bool(answer)

    def all_have(self, value) -> bool:
        """Whether the whole team has the same value."""
        if self.tp == 1:
            return True
        values = [None] * self.tp
        self.together(torch.distributed.all_gather_object, values, value)
        return all(other == value for other in values)

    def add_up(self, tensors: dict) -> None:
        """The sums over all teams, in place."""
        for tensor in tensors.values() if self.teams > 1 else ():
            here = tensor.cpu()
            self.together(lambda: self.peers.allreduce([here]).wait())
            tensor.copy_(here)

    def put_together(self, tensors: dict) -> dict:
        """The sums over the team, each of which has a part, and 0 for the rest."""
        if self.tp == 1:
            return tensors
        result = {}
        for name, tensor in tensors.items():
            here = tensor.double()  # of which each number is one's own
            self.together(torch.distributed.all_reduce, here)
            result[name] = here.to(tensor.dtype)
        return result

    def wait(self) -> None:
        if self.size > 1:
            self.together(lambda: self.everyone.barrier().wait())

    def check(self, error: BaseException) -> None:
        """Raise one line where an error is that another process has ended."""
        words = re.search("gloo|connection|peer", str(error).lower())
        if self.size > 1 and (words or isinstance(error, torch.distributed.DistError)):
            raise UserError(self.ended()) from error

    def together(self, work, *arguments) -> None:
        try:
            work(*arguments)
        except RuntimeError as error:  # gloo notices before torchrun does
            raise UserError(self.ended()) from error
