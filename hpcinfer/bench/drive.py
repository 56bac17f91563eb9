"""A loaded model, driven by the engine's own loop, with the time of every step kept.

Prompts are random token ids. For decoding, the cache is filled with random keys and values in the
place of those of a prompt, so that a long context costs no prefill: a step takes the same time,
whatever it reads.
"""

import os
from dataclasses import dataclass
from functools import partial

import numpy as np

from hpcinfer import array, node, partition
from hpcinfer.bench import work
from hpcinfer.bench.limits import measured
from hpcinfer.bench.random_checkpoint import RandomCheckpoint, has_weights
from hpcinfer.bench.shape import numbers
from hpcinfer.engine import api
from hpcinfer.engine.block_manager import BlockManager, pages_for
from hpcinfer.engine.feed import Feed
from hpcinfer.engine.generate import GenerateTask
from hpcinfer.engine.loop import run as run_loop
from hpcinfer.engine.loop import sequences_of
from hpcinfer.engine.scheduler import Scheduler
from hpcinfer.errors import UsageError, agreed
from hpcinfer.grid import agree_all
from hpcinfer.requests.request import BadRequest

_BLOCK = 1 << 20  # numbers of the cache that are written at a time


@dataclass(frozen=True)
class Setting:
    """How a model is loaded.

    Attributes
    ----------
    model : Hugging Face directory, converted .h5, or config.json for random weights
    layout, dtype, device, step_tokens : as `hpcinfer.load` takes them
    kernels : choice of `hpcinfer.ops.dispatch`
    bits, group : of random weights, as `RandomCheckpoint` takes them
    """

    model: str
    layout: str | None = None
    dtype: str | None = "bfloat16"
    device: str = "cpu"
    step_tokens: int = 2048
    kernels: str = "auto"
    bits: int | None = None
    group: int = 32

    @classmethod
    def of(cls, options):
        """Of the options of a bench that loads a model.

        Raises
        ------
        UsageError
            If weights cannot be quantised as the options say.
        """
        # Not every bench has all of them.
        given = {name: getattr(options, name, None) for name in ("layout", "quantize", "group")}
        codes, group = given["quantize"], given["group"]
        bits = None if codes is None else int(codes.removeprefix("int"))
        if group and not bits:
            raise UsageError(
                f"bench: got --group {group} alone, need --quantize int8 or int4 with it"
            )
        if bits and has_weights(options.model):
            raise UsageError(
                f"bench: got --quantize for {options.model}, which has weights, need a bare "
                "config.json; or give a model made by hpcinfer convert --quantize"
            )
        return cls(
            options.model, given["layout"], options.dtype, options.device, options.step_tokens,
            options.kernels, bits, group or 32,
        )  # fmt: skip

    @property
    def name(self):
        """The model's name in a table: the last part of its path that says something."""
        path = os.path.abspath(self.model).removesuffix("/config.json")
        return os.path.basename(path).removesuffix(".json")

    def source(self):
        """What `hpcinfer.load` reads: the path, or a checkpoint of random weights."""
        if has_weights(self.model):
            return self.model
        return RandomCheckpoint(self.model, array.parse_dtype(self.dtype), self.bits, self.group)


@dataclass(frozen=True)
class Spent:
    """Steps of one run on this rank.

    Attributes
    ----------
    steps : list of (tokens, prompt tokens among them, seconds)
    sequences : of this replica
    """

    steps: list
    sequences: int

    def turns_s(self):
        """Seconds in which every sequence got one more token, prompts being over, one by one."""
        turns, tokens, time_s = [], 0, 0.0
        for n, n_prompt, step_s in self.steps:
            if n_prompt == 0:
                tokens, time_s = tokens + n, time_s + step_s
                if tokens >= self.sequences:
                    turns.append(time_s)
                    tokens, time_s = tokens - self.sequences, 0.0
        return turns

    def prompts_s(self):
        """Seconds of the steps with prompts."""
        return sum(step_s for _, n_prompt, step_s in self.steps if n_prompt)


class Bench:
    """A model that is loaded to be measured.

    Parameters
    ----------
    comm : communicator of the ranks
    setting : Setting
    sequences, context : most sequences, and most tokens of one, that a run will have

    Attributes
    ----------
    engine : Engine
    load_s, bytes_read : seconds from opening the model to weights in memory, bytes of it read
    most_pages : pages of a rank's cache that fit
    """

    def __init__(self, comm, setting, sequences, context):
        self._load_before = comm.bcast(os.getloadavg()[0])
        self.comm, self.setting = comm, setting
        source = agree_all(comm, setting.source)

        # Twice the sequences: their pages may be dealt to the pools of a cut cache unevenly.
        self.engine = engine = api.load(
            source, comm, setting.layout, setting.dtype, setting.device,
            step_tokens=setting.step_tokens, sequences=2 * sequences, context=context,
            kernels=setting.kernels,
        )  # fmt: skip
        self.load_s, self.bytes_read = engine.stats.load_s, engine.stats.bytes_read
        self.arch, self.model, self.grid = engine.model.arch, engine.model, engine.grid
        self.most_pages = engine.scheduler.pages.n
        self.allocate(min(1, self.most_pages))

    def pages(self, batch, tokens):
        """Pages of a rank that sequences of so many tokens need."""
        own = max(partition.counts(partition.block(batch, self.grid.layout.dp)))
        pools = max(self.comm.allgather(self.model.pools))
        return own * -(-pages_for(tokens) // pools) + (own if pools > 1 else 0)

    def allocate(self, pages):
        """Give the cache a number of pages, with random numbers in them."""
        self._pages = pages
        self.model.allocate_cache(pages)
        cache = getattr(self.model, "cache", None)
        for _, x in cache.arrays() if cache is not None else ():
            flat, few = x.reshape(-1), self.model.device.put(numbers((_BLOCK,), self.model.dtype))
            for start in range(0, len(flat), _BLOCK):
                flat[start : start + _BLOCK] = few[: len(flat) - start]

    def prefill(self, batch, context):
        """Compute the prompts of some sequences; returns Spent."""
        return self._run(batch, context, 1, cached=False)

    def decode(self, batch, context, new):
        """Generate `new` tokens for each of some sequences that have their context in the cache.

        Returns
        -------
        Spent, with the step of each context's last token, which counts as one with a prompt
        """
        return self._run(batch, context, new + 1, cached=True)

    def touched(self, tokens, measure):
        """Result of `measure()`, and the share of the experts that a step of it touched."""
        self.model.expert_load.clear()
        result = measure()
        return result, work.touched_share(self.arch, self.engine.expert_load(), tokens)

    def limits(self):
        """The limits of the machine, measured now."""
        return measured(
            self.comm, self.model.device, self.model.dtype, self.arch.D, self.setting.kernels
        )

    def read_bytes(self, batch, length, touched=1.0):
        """Bytes that a step of one token of every sequence reads, on all ranks together."""
        own, nbytes = self.own(batch), 0.0
        if own or self.grid.role == "ffn":
            nbytes = work.weight_bytes(self.model, touched)
            nbytes += own * work.cache_bytes(self.model, length)
        return sum(self.comm.allgather(nbytes))

    def replicas(self, value):
        """The values of all replicas, from their leaders; every rank calls this."""
        return [v for v, leads in self.comm.allgather((value, self.grid.is_leader)) if leads]

    def facts(self):
        """What the rows of this model have in common; every rank calls this."""
        model, most = self.model, lambda n: max(self.comm.allgather(n))
        shapes = [x.nbytes for _, x in model.cache.arrays()] if self.grid.role != "ffn" else []
        return {
            "model": self.setting.name,
            "dtype": str(model.dtype),
            "weights": max(self.comm.allgather(self._weights())),
            "layout": str(self.grid.layout),
            "device": model.device.name,
            "kernels": self.setting.kernels,
            "ranks": self.comm.size,
            "threads": node.threads_per_rank(),
            "load_before": self._load_before,
            "weight_bytes": most(model.weights.nbytes),
            "cache_bytes": most(sum(shapes)),
            "peak_bytes": most(node.peak_memory_bytes()),
        }

    def _weights(self):
        """How the matrices of the layers are kept: as numbers of a type, or as codes."""
        layers = (layer for layer in getattr(self.model.weights, "layers", ()) if layer is not None)
        forms = {x.form for layer in layers for x in vars(layer).values() if hasattr(x, "form")}
        words = {f"int{form.bits} in groups of {form.group}" for form in forms}
        return ", ".join(sorted(words)) or str(self.model.dtype)

    def own(self, batch):
        """Sequences of this replica among those of a batch."""
        return partition.counts(partition.block(batch, self.grid.layout.dp))[self.grid.dp.rank]

    def _run(self, batch, context, max_tokens, cached):
        engine, own, steps = self.engine, self.own(batch), []
        engine.observers = [partial(_keep, steps)]
        engine.scheduler = Scheduler(
            BlockManager(self._pages, self.model.pools), engine.limits, self.arch.rope
        )
        todo = GenerateTask(engine)
        for sequence in self._sequences(todo, own, context, max_tokens):
            if cached:
                self._take_up(sequence, context - 1)
            else:
                engine.scheduler.add(sequence)
        with engine.in_use(), Feed(self.grid, iter(()), 0) as feed:
            run_loop(engine, feed, _refuse, todo)
        return Spent(steps, own)

    def _sequences(self, todo, n, context, max_tokens):
        """Sequences of random prompts, each with its own."""
        rng, V = np.random.default_rng(self.grid.dp.rank), self.arch.V
        prompts = rng.integers(0, V, (n, context)) if self.grid.role != "ffn" else []
        reader = self.engine.reader(
            {
                "max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True,
                "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0,
                "presence_penalty": 0.0, "frequency_penalty": 0.0,
            }
        )  # fmt: skip
        items = ({"prompt_token_ids": prompt.tolist()} for prompt in prompts)
        for request in reader.read_items(items):
            yield from sequences_of(self.engine, request, _refuse, todo)

    def _take_up(self, sequence, computed):
        """Let a sequence run as if its first tokens were computed."""
        pages = self.engine.scheduler.pages
        first = pages.emptiest
        owners = [(first + i) % pages.ranks for i in range(pages_for(computed))]
        self.engine.scheduler.resume(sequence, computed, pages.allocate(owners))


def _keep(steps, micro, time_s):
    """Add a step that computed anything to those of `Spent`."""
    if micro.step.n_tokens:
        steps.append((micro.step.n_tokens, micro.n_prompt, time_s))


def _refuse(outcome):
    """Take a finished request, and refuse one that cannot run."""
    if isinstance(outcome, BadRequest):
        raise agreed(ValueError(outcome.message))
