"""Context parallelism equals transformers: every prefill and decode mode, alone and with tp."""

import pytest
from helpers.layouts import MODES
from helpers.parity import assert_equals_record, load

DENSE = ("llama-gqa", "qwen2", "mistral-window", "gpt_neox")
ONE_KV_HEAD = ("deepseek_v2", "deepseek_v3")
CASES = (*DENSE, "qwen2_moe-step", "olmoe", *ONE_KV_HEAD)
CHUNKED = ("llama-gqa", "mistral-window", "deepseek_v3")


def layouts(size):
    """Layouts of `size` ranks that cut the sequence: cp alone, and with tp where it divides."""
    cuts = [(1, size)] + [(tp, size // tp) for tp in (2, 4) if size % tp == 0 and size > tp]
    return [f"tp={tp},cp={cp}" for tp, cp in cuts]


@pytest.mark.parametrize("modes", MODES, ids="-".join)
@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(comm, shared_path, case, modes):
    """Whole prompts in one step, and in chunks that meet keys of the chunks before."""
    prefill, decode = modes
    for layout in layouts(comm.size):
        most = 1 if case in ONE_KV_HEAD else 2
        if prefill == "ulysses" and int(layout[3]) > most:
            continue
        engine = load(
            comm,
            case,
            "directory",
            shared_path,
            layout=f"{layout},prefill={prefill},decode={decode}",
        )
        assert_equals_record(engine, case)
        if case in CHUNKED:
            engine.limits.tokens = 40
            assert_equals_record(engine, case)


@pytest.mark.parametrize(
    "case",
    [
        "llama-rope-longrope",
        "llama-rope-dynamic",
        "gpt2",
        "qwen3",
        "mixtral-window",
        "deepseek_v2-lite",
        "deepseek_v3-plain",
    ],
)
def test_other_families(comm, shared_path, case):
    """The default modes for the families and ropes that the other test leaves out."""
    for layout in layouts(comm.size):
        assert_equals_record(load(comm, case, "directory", shared_path, layout=layout), case)
