"""The process that encodes: what a stranger's files may take, and what happens beyond it."""

import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
from helpers.jobs import alive, clean_environment, wait_for
from helpers.paths import ROOT
from helpers.texts import bytes_only

from hpcinfer.text.text import Text
from hpcinfer.text.worker import Budget, Worker

pytestmark = pytest.mark.single

BUDGET = Budget(memory_bytes=1 << 28, seconds=0.3, open_s=10.0)
USER = [{"role": "user", "content": "hi"}]
TOO_MUCH = (
    r"got more than 0\.[0-9]+ (GiB of memory|s of processor time) for one request, need less; "
)


@pytest.fixture(scope="module")
def worker():
    worker = Worker(BUDGET)
    yield worker
    worker.close()


def text_of(worker, template=None, **parts):
    """Text of the tokenizer of bytes with other parts."""
    files = SimpleNamespace(
        tokenizer_json=json.dumps(json.loads(bytes_only()) | parts),
        tokenizer_config={},
        special_tokens_map={},
        chat_template=template,
        generation_config={},
        config={},
    )
    return Text(files, worker=worker)


def split(regex):
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def replaced(content, **pattern):
    return {"type": "Replace", "pattern": pattern, "content": content}


GROWING = "{% set x = 'a\n\t' * 300000 %}"
TEMPLATES = {
    "nested lists": "{% set ns = namespace(x=[1]) %}{% for i in range(45) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "indent": GROWING + "{{ x | indent('b' * 10000) }}",
    "wordwrap": GROWING + "{{ x | wordwrap(1, wrapstring='b' * 10000) }}",
    "expandtabs": GROWING + "{{ x.expandtabs(100000) }}",
    "sum": "{% set x = [[1] * 1000] * 1000 %}{{ ([x] * 100000) | sum(start=[]) | length }}",
    "sort": "{% set x = range(99999) | list %}{{ (x * 300) | sort(reverse=true) | length }}",
    "unique": "{% set x = range(99999) | list %}{{ (x * 300) | unique | list | length }}",
    "urlize": "{{ ('http://a.b ' * 100000) | urlize(target='b' * 10000) }}",
    "translate": GROWING + "{{ x.translate({97: x}) }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_takes_too_much_is_refused(worker, name):
    text = text_of(worker, TEMPLATES[name])
    with pytest.raises(ValueError, match=f"^chat template: {TOO_MUCH}check tokenizer.json"):
        text.encode_chat(USER)
    assert text.encode("ab") == text_of(worker).encode("ab")


@pytest.mark.parametrize(
    ("parts", "prompt", "words"),
    [
        ({"normalizer": replaced("b" * 10**6, String="a")}, "a" * 999, TOO_MUCH),
        ({"pre_tokenizer": split("(a|aa)+$")}, "a" * 60 + "b", "got Onig: .*retry-limit.*, need a"),
        ({"pre_tokenizer": split("(x+x+)+y|a")}, "x" * 30000, "got (Onig|more than 0.[0-9]+ s)"),
    ],
    ids=["grows", "panics", "is slow"],
)
def test_a_tokenizer_that_takes_too_much_is_refused(worker, parts, prompt, words):
    text = text_of(worker, **parts)
    with pytest.raises(ValueError, match=f"^tokenizer: {words}") as caught:
        text.encode(prompt)
    assert "\n" not in str(caught.value)
    assert text.decode(text.encode("q")) == "q"


def test_a_token_that_is_too_long_is_refused(worker):
    added = {"id": 258, "content": "x" * 5000, "single_word": False, "lstrip": False}
    added |= {"rstrip": False, "normalized": False, "special": False}
    with pytest.raises(ValueError, match="^tokenizer: got a token of 5000 characters, need at mo"):
        text_of(worker, added_tokens=[added])


@pytest.mark.parametrize(
    "step", [replaced("b" * 99, String="a"), replaced("b", Regex="(a|aa)+$")], ids=["long", "regex"]
)
def test_a_decoder_that_could_take_too_much_is_refused(worker, step):
    for decoder in (step, {"type": "Sequence", "decoders": [step, {"type": "Fuse"}]}):
        with pytest.raises(ValueError, match="^tokenizer: got the decoder .*, need one that repl"):
            text_of(worker, decoder=decoder)


def test_a_decoder_that_panics_is_one_line(worker):
    """The library strips more characters than there are."""
    strip = {"type": "Strip", "content": "a", "start": 0, "stop": 3}
    text = text_of(worker, decoder=strip)
    with pytest.raises(ValueError, match="^tokenizer: got .*, need tokens that the decoder joins;"):
        text.decode(text.encode("ab") + text.encode("a"))


def test_a_prompt_with_too_many_tokens_is_refused_before_it_comes_back(worker):
    text = text_of(worker, normalizer=replaced("b" * 1000, String="a"))
    with pytest.raises(ValueError, match="^request: got a prompt of 9000 tokens, need at most the"):
        text.encode("a" * 9, limit=100)


def test_the_process_is_bounded_and_knows_no_mpi(worker):
    text_of(worker).encode("a")
    process = psutil.Process(worker.process_id)
    soft, _ = process.rlimit(psutil.RLIMIT_AS)
    assert BUDGET.memory_bytes < soft < BUDGET.memory_bytes + (1 << 21)
    loaded = {os.path.basename(m.path) for m in process.memory_maps()}
    assert not [name for name in loaded if "mpi" in name.lower() or "numpy" in name.lower()]
    assert not [name for name in process.environ() if name.startswith(("PMI", "SLURM", "OMPI"))]


def test_the_process_outlives_signals_of_the_job_and_is_replaced_when_killed(worker):
    text = text_of(worker)
    process, ids = psutil.Process(worker.process_id), text.encode("ab")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    assert text.encode("ab") == ids and worker.process_id == process.pid
    process.kill()
    wait_for(lambda: not alive(process), 5)
    assert text.encode("ab") == ids and worker.process_id != process.pid


def test_texts_take_turns(worker):
    plain, other = text_of(worker), text_of(worker, normalizer=replaced("b", String="a"))
    for _ in range(2):
        assert plain.decode(plain.encode("ab")) == "ab" and other.decode(other.encode("ab")) == "bb"


def test_tables_make_a_text_elsewhere(worker):
    text = text_of(worker)
    copy = Text(SimpleNamespace(**text._files), json.loads(json.dumps(text.tables)), worker)
    assert copy.decode(text.encode("äb")) == "äb" and copy.eos_ids == text.eos_ids


FOREVER = """
import sys
from types import SimpleNamespace
from hpcinfer.text.text import Text
from hpcinfer.text.worker import Budget, Worker
template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
files = dict.fromkeys(["tokenizer_config", "special_tokens_map", "generation_config", "config"], {})
worker = Worker(Budget(seconds=60.0))
text = Text(SimpleNamespace(tokenizer_json=None, chat_template=template, **files), worker=worker)
print(worker.process_id, flush=True)
text.render_chat([{"role": "user", "content": "a"}])
"""


def test_the_process_ends_with_its_parent():
    """Also in the midst of a request, where it does not see that its pipe is closed."""
    parent = subprocess.Popen(
        [sys.executable, "-c", FOREVER], stdout=subprocess.PIPE, env=clean_environment(), cwd=ROOT
    )
    process = psutil.Process(int(parent.stdout.readline()))
    wait_for(lambda: process.cpu_times().user > 0.3, 20)
    parent.kill()
    parent.wait()
    wait_for(lambda: not alive(process), 5)
    parent.stdout.close()
