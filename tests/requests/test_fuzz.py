"""Random damage to everything that hpcinfer reads: one line of an error, or a right result.

13,500 mutations, seeded: bits flipped, ends cut off, pieces moved, JSON edited so that it stays
JSON. None may raise anything but ValueError or RuntimeError in one line of the house's form, take
the processor for longer than `CASE_S`, or memory beyond `MEMORY_BYTES`. What can take the process
with it (the HDF5 library, loading and running a whole model) runs in forked workers whose memory
the system limits. A converted model whose bytes were changed either has what was converted or is
refused: at the latest by the check that reads all weights.
"""

import copy
import json
import os
import pickle
import random
import re
import resource
import select
import shutil
import signal
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.texts import (
    CHATML,
    CONTROLS,
    DEFAULTS,
    LIMITS,
    LLAMA3,
    TOKENIZERS,
    bytes_only,
    make_text,
    mutated,
)
from mpi4py import MPI
from reference import models
from safetensors.numpy import save

import hpcinfer
from hpcinfer.io import hdf5, integrity, metadata
from hpcinfer.io.convert import convert
from hpcinfer.io.inspect import describe
from hpcinfer.io.models import open_checkpoint
from hpcinfer.io.results import open_results
from hpcinfer.io.safetensors import open_directory, read_header
from hpcinfer.model.families import read_architecture
from hpcinfer.model.weights.check import check
from hpcinfer.node import peak_memory_bytes
from hpcinfer.requests.defaults import defaults_from
from hpcinfer.requests.reader import RequestReader
from hpcinfer.requests.request import BadRequest, Request
from hpcinfer.text.text import Text
from hpcinfer.text.worker import Budget, Worker

pytestmark = [pytest.mark.single, pytest.mark.timeout(300)]

# Reads tokenizers and templates, with little to spend
WORKER = Worker(Budget(memory_bytes=1 << 28, seconds=0.3))

CASE_S, HANG_S = 5.0, 60.0
MEMORY_BYTES = 512 << 20
LINE = re.compile(r"[a-zA-Z_ ]+: ([a-z]+: )?(got|cannot) .+")

CONFIG = {
    "model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 258, "torch_dtype": "float32",
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                     "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip
VALUES = [
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**53, 2**63, 10**30, -(10**30), 0.5, 1e308, -1e-308,
    "", "x", "a" * 1000, "\ud800", "\0", "F32", "BF16", "none", [], [0], [0, 0], [2**62, 2**62],
    [1] * 40, [[]], [None], {}, {"a": 1}, {"type": "BPE"}, [{}],
]  # fmt: skip


# --- Mutations -----------------------------------------------------------------------------------


def bent(rng, content):
    """Bytes with a few bits flipped, a piece cut off, moved, repeated or overwritten."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        size = len(content)
        if not size:
            break
        at, n = rng.randrange(size), min(size, 1 << rng.randrange(10))
        kind = rng.randrange(6)
        if kind < 2:
            content[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del content[at:]
        elif kind == 3:
            start = rng.randrange(size)
            content[at : at + n] = content[start : start + n]
        elif kind == 4:
            start = rng.randrange(size)
            content[at:at] = content[start : start + n]
        else:
            content[at : at + n] = rng.choice((bytes(n), b"\xff" * n, rng.randbytes(n)))
    return bytes(content)


def edited(rng, value):
    """JSON value with a few values replaced, left out, exchanged, renamed or nested."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        places = list(holders(value))
        if not places:
            return value
        holder, key = rng.choice(places)
        other, other_key = rng.choice(places)
        kind = rng.randrange(8)
        if kind < 3:
            holder[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind == 3 and type(holder[key]) in (int, float):
            holder[key] += rng.choice((-1, 1, 2, 8, 2**32, -(2**32)))
        elif kind == 4:
            del holder[key]
        elif kind == 5 and isinstance(holder, dict):
            holder[rng.choice(("x", "", str(key) + "x"))] = holder.pop(key)
        elif kind == 6:
            holder[key], other[other_key] = (
                copy.deepcopy(other[other_key]),
                copy.deepcopy(holder[key]),
            )
        else:
            deep = holder[key]
            for _ in range(rng.choice((1, 3, 30))):
                deep = rng.choice(([deep], {"a": deep}))
            holder[key] = deep
    return value


def holders(value):
    """Every (container, key) in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(items):
        yield value, key
        if isinstance(item, dict | list):
            yield from holders(item)


def text_mutation(rng, value):
    """Text of a JSON value, damaged as JSON or as text."""
    if rng.random() < 0.7:
        return json.dumps(edited(rng, value)).encode("utf-8", "surrogatepass")
    return bent(rng, json.dumps(value).encode())


# --- Judgement -----------------------------------------------------------------------------------


@contextmanager
def limited(case):
    """One case: refused in one line, or right; in time."""

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, CASE_S)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (ValueError, RuntimeError) as error:
        line = str(error)
        assert LINE.fullmatch(line) and len(line) < 2000, f"{case!r}: {error!r}"
    except AssertionError:
        raise
    except BaseException as error:
        raise AssertionError(f"{case!r}: {error!r}") from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@pytest.fixture(autouse=True, scope="module")
def memory():
    """What all cases that run in this process have added to its largest size."""
    before = peak_memory_bytes()
    yield
    WORKER.close()
    assert peak_memory_bytes() - before < MEMORY_BYTES


# --- The tiny model ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A model directory of some kilobytes."""
    folder = tmp_path_factory.mktemp("fuzz") / "tiny"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(save(tensors(), {"format": "pt"}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text(bytes_only())
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return folder


def tensors():
    rng = np.random.default_rng(3)
    shapes = {"model.embed_tokens.weight": (258, 8), "model.norm.weight": (8,)}
    shapes |= {"lm_head.weight": (258, 8)}
    for n in range(2):
        at = f"model.layers.{n}."
        shapes |= {
            f"{at}input_layernorm.weight": (8,),
            f"{at}post_attention_layernorm.weight": (8,),
        }
        shapes |= {f"{at}self_attn.{x}_proj.weight": (8, 8) for x in "qo"}
        shapes |= {f"{at}self_attn.{x}_proj.weight": (4, 8) for x in "kv"}
        shapes |= {f"{at}mlp.{x}_proj.weight": (12, 8) for x in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (8, 12)}
    return {name: rng.standard_normal(shape).astype("f4") for name, shape in shapes.items()}


# --- Cheap cases, in this process ----------------------------------------------------------------


def test_headers_of_safetensors(tiny, tmp_path):
    """A table that is accepted names bytes of the file, each once."""
    content = (tiny / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header, rng = json.loads(content[8:start]), random.Random(1)
    path = tmp_path / "model.safetensors"
    for case in range(2500):
        if rng.random() < 0.6:
            text = json.dumps(edited(rng, header)).encode("utf-8", "surrogatepass")
            damaged = len(text).to_bytes(8, "little") + text + content[start:]
        else:
            damaged = bent(rng, content[: start + 64]) + content[start + 64 :]
        path.write_bytes(damaged)
        with limited(("header", case)):
            table = read_header(path)
            spans = sorted((i.offset, i.offset + i.nbytes) for i in table.values())
            assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:], strict=False))
            assert not spans or spans[-1][1] == len(damaged)


def test_an_index(tiny, tmp_path):
    """Tensors come from the files of the folder that the index names, or not at all."""
    shutil.copytree(tiny, tmp_path / "model")
    folder, arrays = tmp_path / "model", tensors()
    (folder / "model.safetensors").unlink()
    names = sorted(arrays)
    halves = {"a.safetensors": names[:9], "b.safetensors": names[9:]}
    for file, part in halves.items():
        (folder / file).write_bytes(save({name: arrays[name] for name in part}))
    weight_map = {name: file for file, part in halves.items() for name in part}
    rng = random.Random(2)
    for case in range(500):
        index = folder / "model.safetensors.index.json"
        index.write_bytes(text_mutation(rng, {"metadata": {}, "weight_map": weight_map}))
        with limited(("index", case)):
            for name, info in open_directory(folder).tensors.items():
                assert name in arrays and os.path.dirname(info.file) == str(folder)


def test_configs():
    """Of all families: what is accepted can be held against the weights."""
    rng, cases = random.Random(3), list(models.CASES.values())
    table = {}
    for case in range(2500):
        text = text_mutation(rng, rng.choice(cases))
        with limited(("config", case, text)):
            arch = read_architecture(metadata.parse_object(text, "config.json"))
            check(arch, table)


def test_tokenizers():
    """What is accepted encodes and decodes."""
    rng = random.Random(4)
    originals = [json.loads(make().to_str()) for make in TOKENIZERS.values()]
    originals.append(json.loads(bytes_only()))
    for case in range(1000):
        content = text_mutation(rng, rng.choice(originals)).decode("utf-8", "replace")
        with limited(("tokenizer", case)):
            text = text_with(tokenizer_json=content)
            text.decode([*text.encode("hé llo 你好😀\n"), 5, 300], after_text=True)
            text.token_bytes(7)


def test_companions_of_a_tokenizer():
    """tokenizer_config, special_tokens_map, generation_config, and the ends that config names."""
    content, rng = bytes_only(), random.Random(5)
    files = {
        "tokenizer_config": {
            "bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False},
            "added_tokens_decoder": {"258": {"content": "<x>", "special": True}},
            "additional_special_tokens": ["<y>"], "extra_special_tokens": {"z": "<z>"},
        },
        "special_tokens_map": {"bos_token": "<s>", "pad_token": {"content": "<p>"}},
        "generation_config": {"eos_token_id": [1, 2], "temperature": 0.7, "top_k": 5},
        "config": {"eos_token_id": 1},
    }  # fmt: skip
    for case in range(1000):
        changed = {name: text_mutation(rng, value) for name, value in files.items()}
        with limited(("companions", case, changed)):
            name = rng.choice(list(files))
            whole = files | {name: metadata.parse_object(changed[name], name)}
            text = text_with(tokenizer_json=content, **whole)
            text.encode("a")
            defaults_from(whole["generation_config"])


def text_with(**files):
    empty = dict.fromkeys(
        ("tokenizer_config", "special_tokens_map", "generation_config", "config"), {}
    )
    return Text(SimpleNamespace(**({"chat_template": None} | empty | files)), worker=WORKER)


HOSTILE = [
    "{% for a in range(99999) %}", "{% endfor %}", "{{ x * 10 ** 9 }}", "{{ 'a' * 10 ** 9 }}",
    "{{ x ** x }}", "{% set x = messages * 9999 %}", "{% set x = (x ~ x) %}",
    "{{ x | center(1e9) }}",
    "{{ messages | tojson(indent=10**9) }}", "{{ ''.__class__ }}", "{% macro f() %}{{ f() }}",
    "{% endmacro %}{{ f() }}", "{{ '%9999999d' % 1 }}", "{% set x = x * x %}",
    "{{ x | batch(9**9) }}",
    "{{ [x] * 99999 | string }}", "{{ x | list | string }}", "{{ range(99999) | join(x) }}",
    "{{ (range(99999) | list) * 999 }}", "{{ x | replace('', x) }}", "{{ x | urlize }}",
    "{{ x | sum }}", "{{ messages | map(attribute='x' * 10**6) | list }}", "{{ x | wordwrap(1) }}",
    "{{ 'a' | indent(10**9) }}", "{{ x.split() }}", "{{ x.translate({97: x}) }}", "{{ x | sort }}",
]  # fmt: skip


def test_chat_templates():
    """Templates cut up and put together with hostile pieces: in time and within bounds."""
    rng = random.Random(6)
    pieces = [re.split(r"(?<=[}])", source) for source in (CHATML, LLAMA3, CONTROLS)]
    for case in range(1000):
        parts = list(rng.choice(pieces))
        for _ in range(rng.randrange(1, 5)):
            at = rng.randrange(len(parts) + 1)
            parts[at : at + rng.randrange(3)] = [rng.choice(HOSTILE + rng.choice(pieces))]
        source = "".join(parts)
        if rng.random() < 0.2:
            source = bent(rng, source.encode()).decode("utf-8", "replace")
        text = text_with(tokenizer_json=None, chat_template="{% set x = 'a' * 999 %}" + source)
        messages = [{"role": rng.choice(("user", "system", "")), "content": "hi"}] * 3
        with limited(("template", case, source)):
            assert len(text.render_chat(messages)) < 1 << 27


def test_input_lines():
    """Whatever a line holds, it is a request or a refusal in one line."""
    rng, text = random.Random(7), make_text()
    for case in range(2500):
        raw = mutated(rng) if rng.random() < 0.7 else bent(rng, mutated(rng))
        with limited(("line", case, raw)):
            reader = RequestReader(text, DEFAULTS, LIMITS, score=rng.random() < 0.5)
            outcome = rng.choice((reader.parse_line, reader.parse_text_line))(1, raw)
            assert isinstance(outcome, Request | BadRequest)
            if isinstance(outcome, BadRequest):
                assert LINE.fullmatch(outcome.message)
            else:
                assert all(0 <= token < LIMITS.vocab_size for token in outcome.token_ids)


# --- Cases that may take the process with them: in workers --------------------------------------


def in_workers(n, run, per_worker=50):
    """Call run(case) for all cases in forked processes of bounded memory.

    Returns
    -------
    outcomes, in order of the cases
    """
    outcomes = []
    for first in range(0, n, per_worker):
        last = min(n, first + per_worker)
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            # Nothing of the parent's, MPI least of all, may be run down by the child
            try:
                os.close(read)
                bound_memory()
                with os.fdopen(write, "wb") as pipe:
                    for case in range(first, last):
                        try:
                            outcome = run(case)
                        except BaseException as error:
                            outcome = AssertionError(f"{case}: {error!r:.2000}")
                        pipe.write(pickle.dumps(outcome))
                        pipe.flush()
            finally:
                os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb", buffering=0) as pipe:
            for case in range(first, last):
                try:
                    # The alarm of a case is not heard inside of a library
                    if select.select([pipe], [], [], HANG_S)[0]:
                        outcome = pickle.load(pipe)
                    else:
                        outcome = AssertionError(f"case {case} hangs")
                except EOFError:
                    _, status = os.waitpid(child, 0)
                    pytest.fail(f"case {case} ended its process with status {status:#x}")
                if isinstance(outcome, AssertionError):
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    raise outcome
                outcomes.append(outcome)
        os.waitpid(child, 0)
    return outcomes


def bound_memory():
    """Let this process have `MEMORY_BYTES` more than it has now."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES, now + MEMORY_BYTES))


@pytest.fixture(scope="module")
def converted(tiny):
    """The tiny model as one file, and where in it no weights stand."""
    path = tiny.parent / "model.h5"
    convert(tiny, path)
    return path, outside_of_weights(path)


def test_converted_models(converted, tmp_path):
    """Changed bytes are refused, or change nothing that is read."""
    (source, outside), path = converted, tmp_path / "damaged.h5"
    content = source.read_bytes()
    with open_checkpoint(source) as model:
        expected = facts(model)

    def run(case):
        rng = random.Random(1000 + case)
        path.write_bytes(bent(rng, content) if rng.random() < 0.4 else poked(rng, content, outside))
        outcome = "refused"
        with limited(("h5", case)):
            with open_checkpoint(path):
                outcome = "opened"
            found, _ = integrity.check(path)
            if found is not None:
                raise ValueError(found[1].line)
            with open_checkpoint(path) as model:
                assert facts(model) == expected, "a wrong result was taken as good"
            outcome = "right"
        return outcome

    outcomes = in_workers(1000, run)
    assert outcomes.count("refused") > 500
    assert min(outcomes.count("opened"), outcomes.count("right")) > 30


def test_converted_models_of_old_structure(tiny, tmp_path, monkeypatch):
    """In structures without checksums damage would crash the library: it does not see them."""
    monkeypatch.setattr(hdf5, "LIBVER", ("earliest", "v110"))
    source, path = tmp_path / "model.h5", tmp_path / "damaged.h5"
    convert(tiny, source)
    content = source.read_bytes()
    with pytest.raises(ValueError, match="HDF5 superblock of version 0, need 2 or more"):
        open_checkpoint(source)

    def run(case):
        rng = random.Random(5000 + case)
        path.write_bytes(poked(rng, content, range(8, 2000)))
        with limited(("old h5", case)):
            with open_checkpoint(path) as model:
                facts(model)

    in_workers(500, run)


def test_inspection_of_results(tmp_path):
    """Results with damage are described or refused."""
    path = tmp_path / "out.h5"
    with open_results(path, "score", {"model": "m"}, None) as writer:
        for i in range(40):
            facts_of_one = {"index": i, "line": i + 1, "custom_id": f"r{i}", "error": None}
            numbers = {"token_ids": [1, 2], "logprobs": [None, -1.0]}
            writer.write(facts_of_one | numbers | {"sum_logprob": -1.0, "perplexity": 2.7})
    content, damaged = path.read_bytes(), tmp_path / "damaged.h5"

    def run(case):
        damaged.write_bytes(bent(random.Random(case), content))
        with limited(("results", case)):
            describe(damaged, check=True)

    in_workers(500, run)


def poked(rng, content, outside):
    """The file with bits flipped outside of the weights, where the structure stands."""
    content = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        content[rng.choice(outside)] ^= 1 << rng.randrange(8)
    return bytes(content)


def outside_of_weights(path):
    """Places of the bytes of a file that are no weights."""
    inside = np.zeros(os.path.getsize(path), bool)
    with open_checkpoint(path) as model:
        for info in model.tensors.values():
            inside[info.offset : info.offset + info.nbytes] = True
    return np.flatnonzero(~inside).tolist()


def facts(model):
    """All that is read of a model."""
    values = {name: (i.dtype.name, model.read(name).tobytes()) for name, i in model.tensors.items()}
    return values, model.metadata


def test_whole_models(tiny, tmp_path):
    """Directories with a damaged file, loaded and run: refused, or it runs to its end."""
    rng = random.Random(9)
    files = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]

    def run(case):
        rng.seed(case)
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tiny, folder)
        path = folder / rng.choice(files)
        content = path.read_bytes()
        json_file = path.suffix == ".json"
        damaged = text_mutation(rng, json.loads(content)) if json_file else bent(rng, content)
        path.write_bytes(damaged)
        outcome = "refused"
        with limited(("model", case, path.name)):
            model = hpcinfer.load(folder, MPI.COMM_SELF, kv_memory=1 << 20)
            result = model.generate([[1, 5, 9]], max_tokens=2)
            assert all(0 <= token < 258 for token in result[0].choices[0].token_ids)
            model.score(["abc"])
            outcome = "ran"
        return outcome

    outcomes = in_workers(500, run, per_worker=100)
    assert min(outcomes.count("ran"), outcomes.count("refused")) > 50
