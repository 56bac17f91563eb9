"""hpcinfer on a GPU that is none: the engine on the stand-in for CuPy beside the engine on the CPU.

Scores, greedy and sampled tokens, and activations must be those of array code on the CPU, and
nothing may happen that a GPU would answer by wrong numbers (`tests/standin`). A fixed choice of
cases has every family, every word of a layout, and every precision.

HPCINFER_TEST_DEVICE=all   all cases; a number N: every sixth of all, from the Nth on
"""

import json
import math
import os
import re
import sys

import pytest
from helpers.layouts import STRATEGIES
from helpers.paths import ROOT
from reference import models

from hpcinfer.array import DTYPES
from hpcinfer.layout import AXES
from hpcinfer.model.families import FAMILIES

pytestmark = pytest.mark.single

COMPARE = ROOT / "tests" / "standin" / "compare.py"
HPCINFER = (sys.executable, "-m", "hpcinfer")
TURNS = 6
CASES_OF_A_JOB = 5

# Cases as `standin/compare.py` takes them; those of the second list with MPI that reads the memory
# of GPUs.
FIXED = """
llama-gqa/tp=1/bfloat16
llama-gqa/tp=1/float32/plain
gpt2/tp=1/float32
gpt_neox/tp=1/float16
qwen3/tp=1/bfloat16
olmoe/tp=1/float32
deepseek_v2-lite/tp=1/bfloat16
llama-gqa/tp=1/bfloat16/int4
mistral-window/tp=2/float32/int8
llama-gqa/tp=2,sp=on/bfloat16
llama-gqa/cp=2,prefill=ring,decode=tree/float32
mistral-window/cp=2,prefill=split-q,decode=gather/bfloat16
qwen2/cp=2,prefill=ulysses,decode=ring/float32
qwen2/pp=2,stages=memory/float32
llama-tied/pp=2,stages=time/bfloat16
mistral-window/dp=2,zero=allgather/float32
mixtral/afd=1:1/bfloat16
deepseek_v3/tp=2/float32
qwen2_moe/tp=2,pp=2,stages=layers/bfloat16
qwen3_moe/ep=2,tp=2,dp=2,zero=broadcast/float32
""".split()
FIXED_DIRECT = """
llama-gqa/tp=2/float32
mixtral/ep=2,tp=2/bfloat16
""".split()
MORE = """
gpt_neox/tp=1/float32
mistral-window/tp=1/float32
mixtral/tp=1/float32
deepseek_v3/tp=1/float32
qwen3_moe/tp=1/float32
mixtral/tp=1/bfloat16
deepseek_v3/tp=1/bfloat16
qwen3_moe/tp=1/bfloat16
gpt2/tp=1/bfloat16
gpt_neox/tp=1/bfloat16
mistral-window/tp=1/bfloat16
llama-gqa/tp=1/float32
llama-gqa/tp=1/float16
llama-rope-longrope/tp=1/float32
shipped/tp=1/bfloat16
shipped/tp=1/float32/int8
shipped/tp=1/bfloat16/int4
shipped/tp=2/bfloat16/int4
shipped/tp=2/bfloat16/int8
llama-gqa/tp=2/float32
llama-gqa/tp=2/bfloat16
llama-gqa/tp=2,sp=on/float32
llama-gqa/cp=2,prefill=split-q,decode=gather/float32
llama-gqa/cp=2,prefill=ulysses,decode=ring/float32
llama-gqa/cp=2,prefill=ring,decode=tree/bfloat16
llama-gqa/cp=2,prefill=ulysses,decode=gather/bfloat16
llama-gqa/cp=2,prefill=split-q,decode=ring/bfloat16
llama-gqa/pp=2/float32
llama-gqa/dp=2/float32
llama-gqa/dp=2,zero=allgather/float32
llama-gqa/dp=2,zero=broadcast/bfloat16
llama-gqa/cp=2,zero=allgather/bfloat16
llama-gqa/afd=1:1/float32
mixtral/ep=2,tp=2/float32
mixtral/ep=2,dp=2/bfloat16
qwen3_moe/ep=2,tp=2/bfloat16
deepseek_v3/ep=2,cp=2/float32
deepseek_v3/tp=2/bfloat16
deepseek_v3/cp=2,prefill=split-q,decode=gather/float32
deepseek_v3/afd=1:1/float32
gpt2/tp=2/float32
gpt2/cp=2/bfloat16
gpt_neox/tp=2,sp=on/bfloat16
mistral-window/cp=2,prefill=ring,decode=ring/float32
qwen2_moe/tp=2/float32
olmoe/tp=2/float32
qwen2/tp=3/float32
mistral-window/tp=2,cp=2/float32
llama-gqa/tp=2,pp=2/bfloat16
""".split()
MORE_DIRECT = """
llama-gqa/tp=2,sp=on/bfloat16
llama-gqa/cp=2,prefill=ring,decode=tree/float32
llama-gqa/cp=2,prefill=ulysses,decode=gather/bfloat16
llama-gqa/cp=2,prefill=split-q,decode=ring/float32
llama-gqa/pp=2/bfloat16
llama-gqa/dp=2,zero=allgather/bfloat16
llama-gqa/cp=2,zero=broadcast/float32
mixtral/afd=1:1/float32
deepseek_v3/ep=2,dp=2/float32
""".split()


def words_of(case):
    """Words and values of a case's layout."""
    return dict(word.split("=") for word in case.split("/")[1].split(","))


def ranks_of(case):
    """Ranks that a case's layout has."""
    words = words_of(case)
    attention, _, ffn = words.get("afd", "0:0").partition(":")
    axes = [int(words[axis]) for axis in AXES if axis in words]
    return (math.prod(axes) if axes else int(attention)) + int(ffn)


def chosen(which):
    """Cases as the environment asks for them: list of (case, True if MPI reads GPUs' memory)."""
    fixed = [(case, False) for case in FIXED] + [(case, True) for case in FIXED_DIRECT]
    more = [(case, False) for case in MORE] + [(case, True) for case in MORE_DIRECT]
    if not which:
        return fixed
    return fixed + more if which == "all" else (fixed + more)[int(which) % TURNS :: TURNS]


def jobs(cases):
    """The cases put together: list of (ranks, direct, cases), few to a job."""
    together = {}
    for case, direct in cases:
        together.setdefault((ranks_of(case), direct), []).append(case)
    return [
        (*key, of_key[start : start + CASES_OF_A_JOB])
        for key, of_key in sorted(together.items())
        for start in range(0, len(of_key), CASES_OF_A_JOB)
    ]


def test_the_fixed_cases_have_everything_once():
    """Families, words of layouts with their values, and precisions."""
    cases = FIXED + FIXED_DIRECT
    names = {case.split("/")[0] for case in cases}
    shown = {models.CASES[name]["model_type"] for name in names}
    assert shown == {*FAMILIES}
    words = {(word, value) for case in cases for word, value in words_of(case).items()}
    assert {word for word, _ in words} == {*AXES, *STRATEGIES, "ep", "afd"}
    for word, values in STRATEGIES.items():
        assert {v for w, v in words if w == word} >= {*values} - {"off"}
    assert {case.split("/")[2] for case in cases} == DTYPES.keys()
    assert {word for case in cases for word in case.split("/")[3:]} == {"int8", "int4", "plain"}
    assert {ranks_of(case) for case in cases} == {1, 2, 4}


@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("ranks", "direct", "cases"),
    jobs(chosen(os.environ.get("HPCINFER_TEST_DEVICE"))),
    ids=lambda value: value[0].replace("/", "-") if isinstance(value, list) else str(value),
)
def test_the_engine_on_a_device(mpirun, standin, ranks, direct, cases):
    """As on the CPU, without a hazard; graphs are launched where decoding can be captured.

    The threads of a block are taken upwards, downwards or shuffled, by the number of ranks.
    """
    environment = {
        "STANDIN_DEVICES": str(ranks),
        "HPCINFER_GPU_MPI": str(int(direct)),
        "SHIM_ORDER": str(ranks % 3),
    }
    done = mpirun(ranks, sys.executable, COMPARE, *cases, timeout_s=170, **environment, **standin)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {line["case"]: line for line in map(json.loads, done.stdout.splitlines())}
    for case in cases:
        assert found[case]["differences"] == [] and found[case]["hazards"] == {}, found[case]
        if re.fullmatch(r"llama-gqa/tp=\d/\w+", case):
            assert found[case]["graphs"] > 0, found[case]


def test_the_command_on_a_device(mpirun, standin, tmp_path):
    """As users start it, on a GPU for every rank; a hazard would end it."""
    prompts = ["Once there was a shy hare", "What is 2 + 3?"]
    lines = tmp_path / "lines.jsonl"
    lines.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    answers = {}
    for device, settings in (("cpu", {}), ("cuda", {"STANDIN_DEVICES": "2"} | standin)):
        output = tmp_path / f"{device}.jsonl"
        done = mpirun(
            2, *HPCINFER, "generate", ROOT / "data" / "model", "--input", lines, "--output", output,
            "--device", device, "--dtype", "float32", "--kernels",
            "plain" if device == "cpu" else "auto", "--layout", "tp=2", "--kv-memory", "32M",
            "--max-tokens", 12, "--temperature", 0, STANDIN_STRICT="1", **settings,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        answers[device] = [json.loads(line)["response"] for line in output.read_text().splitlines()]
    texts = [[r["body"]["choices"][0]["text"] for r in answers[device]] for device in answers]
    assert texts[0] == texts[1] and all(texts[0])


def test_sums_by_nccl(mpirun, standin):
    """Two GPUs, each a rank's own; answers of one rank, from graphs of whole steps."""
    cases = ("llama-gqa/tp=2/bfloat16", "qwen2/tp=2/float32")
    settings = {"STANDIN_DEVICES": "2", "HPCINFER_NCCL": "1"} | standin
    done = mpirun(2, sys.executable, COMPARE, *cases, timeout_s=55, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in map(json.loads, done.stdout.splitlines()):
        assert line["differences"] == [] and line["hazards"] == {} and line["graphs"] > 0, line


def test_nccl_needs_a_gpu_for_each_rank(mpirun, standin, tmp_path):
    """Said once, on all ranks, before any message."""
    (tmp_path / "in.txt").write_text("Once\n")
    done = mpirun(
        2, *HPCINFER, "generate", ROOT / "data" / "model", "--input", tmp_path / "in.txt",
        "--output", tmp_path / "out.jsonl", "--device", "cuda",
        HPCINFER_NCCL="1", STANDIN_DEVICES="1", **standin,
    )  # fmt: skip
    assert done.returncode == 1
    refusal = "NCCL: got ranks that have one GPU together, need a GPU for each rank; unset HPC"
    assert done.stderr.count(refusal) == 1, done.stderr
