"""Which device, how many threads a rank takes, and what is said of too many ranks."""

import argparse
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from helpers.jobs import clean_environment, run_job
from helpers.paths import ROOT

from hpcinfer import array, node
from hpcinfer.cli.common import duration
from hpcinfer.cli.main import parser
from hpcinfer.engine.placement import advice, spread_advice
from hpcinfer.errors import UsageError
from hpcinfer.layout import parse_layout
from hpcinfer.model.families import read_architecture
from hpcinfer.ops import cuda, dispatch
from hpcinfer.ops.cuda.runtime import blas
from hpcinfer.requests.fields import check_names

pytestmark = pytest.mark.single


class FakeCupy:
    """Of CuPy what choosing a device needs, on a node of `n` GPUs."""

    def __init__(self, n, first_bus=0):
        self.used = []
        self.cuda = SimpleNamespace(
            runtime=SimpleNamespace(
                getDeviceCount=lambda: n,
                deviceGetPCIBusId=lambda ordinal: f"0000:{first_bus + ordinal:02x}:00.0",
            ),
            Device=lambda ordinal: SimpleNamespace(use=lambda: self.used.append(ordinal)),
        )


@pytest.mark.parametrize(("gpus", "expected"), [(4, [0, 1, 2, 3]), (2, [0, 1, 0, 1]), (1, [0] * 4)])
@pytest.mark.parametrize("choice", ["cuda", "auto"])
def test_a_rank_takes_the_gpu_of_its_number(monkeypatch, gpus, expected, choice):
    """Rank number i of a node takes GPU i of those that it sees, and round again if few."""
    cupy, stream = FakeCupy(gpus), SimpleNamespace(use=lambda: None)
    monkeypatch.setattr(array, "_cupy", lambda: cupy)
    monkeypatch.setattr(array, "_stream", lambda ordinal: stream)
    devices = [array.select_device(choice, rank) for rank in range(4)]
    assert [device.ordinal for device in devices] == cupy.used == expected
    assert str(devices[1]) == f"cuda:{expected[1]}"
    assert len({device.identity for device in devices}) == gpus


def test_no_gpu(monkeypatch):
    monkeypatch.setattr(array, "gpu_trouble", lambda: "the driver says no")
    assert array.select_device("auto", 1).name == "cpu"
    assert array.select_device("cpu", 0).identity is None
    refusal = r"^device: got cuda, need a visible GPU and CuPy; use .* \(the driver says no\)$"
    with pytest.raises(ValueError, match=refusal):
        array.select_device("cuda", 0)
    with pytest.raises(ValueError, match="^device: got 'tpu', need cpu, cuda or auto"):
        array.select_device("tpu", 0)


def test_auto_says_why_a_gpu_is_not_used(monkeypatch, tmp_path):
    """Where the driver has left its files, and does not work."""
    monkeypatch.setattr(array, "gpu_trouble", lambda: "the driver says no")
    device = array.select_device("auto", 0)
    monkeypatch.setattr(array, "_GPU_FILES", (tmp_path / "none",))
    assert array.auto_warning(device) is None
    monkeypatch.setattr(array, "_GPU_FILES", (tmp_path,))
    assert array.auto_warning(device).endswith("though there is a GPU here: the driver says no")


@pytest.mark.parametrize(
    ("count", "trouble"),
    [
        (lambda: 1, None),
        (lambda: 0, "no GPU is visible"),
        (lambda: 1 // 0, "integer division or modulo by zero"),
    ],
)
def test_trouble_is_told_in_the_words_of_who_has_it(monkeypatch, count, trouble):
    cupy = FakeCupy(1)
    cupy.cuda.runtime.getDeviceCount = count
    monkeypatch.setattr(array, "_cupy", lambda: cupy)
    assert array.gpu_trouble() == trouble


class FakeRocm:
    """Of CuPy for ROCm what tells it from CuPy for CUDA, and its library of matrix products."""

    def __init__(self, is_hip, products):
        handle = SimpleNamespace(get_cublas_handle=lambda: 7)
        library = SimpleNamespace(gemmEx=lambda *words: products.append(words))
        runtime = SimpleNamespace(is_hip=is_hip)
        self.ndarray = SimpleNamespace
        self.cuda = SimpleNamespace(runtime=runtime, cublas=library, device=handle)

    def use(self, monkeypatch):
        """Let `import cupy` find it."""
        monkeypatch.setitem(sys.modules, "cupy", self)
        monkeypatch.setitem(sys.modules, "cupy.cuda", self.cuda)


@pytest.mark.parametrize("is_hip", [False, True])
def test_the_kernels_need_cuda(monkeypatch, is_hip):
    """Array code runs with CuPy for ROCm, and nothing looks for libraries of CUDA."""
    products = []
    FakeRocm(is_hip, products).use(monkeypatch)
    assert (dispatch.backend("cupy") is None) == is_hip
    assert (cuda.missing() or "").startswith("the kernels need CUDA") == is_hip
    if is_hip:
        monkeypatch.setattr(blas, "_library", lambda version: pytest.fail("looked for"))
        blas._bound.__wrapped__(0, 0)(1, 2)
        assert products == [(7, 1, 2)]


def test_cupy_is_not_loaded_to_ask_for_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    cuda.missing()
    assert "cupy" not in sys.modules


class Node:
    """A communicator of ranks that say the same, but for their cores and GPUs."""

    def __init__(self, monkeypatch, cores, threads=1, gpus=None, quota=None):
        self.size, self._cores, self._gpus = len(cores), cores, gpus or [None] * len(cores)
        monkeypatch.setattr(node, "threads_per_rank", lambda: threads)
        monkeypatch.setattr(node, "core_quota", lambda: quota)
        monkeypatch.delenv("HPCINFER_OVERSUBSCRIBE", raising=False)

    def Get_name(self):
        return "node"

    def allgather(self, own):
        return [(c, gpu, own[2]) for c, gpu in zip(self._cores, self._gpus, strict=True)]


CPU = SimpleNamespace(identity=None)


@pytest.mark.parametrize(
    ("cores", "options", "words"),
    [
        ([{0, 1}] * 2, {}, None),
        ([{0, 1}, {2, 3}], {"threads": 2}, None),  # each rank sees its own cores only
        ([{0, 1}] * 3, {}, "got 3 ranks on 2 cores .*; start 2 ranks or fewer"),
        ([set(range(64))] * 8, {"quota": 4}, "got 8 ranks on 4 cores"),
        ([set(range(8))] * 4, {"threads": 8}, "got 32 threads of 4 ranks on 8 cores .*THREADS=2"),
        ([set(range(8))] * 4, {"threads": None}, None),  # each then takes two
        ([set(range(8))], {"threads": None}, None),
        ([set(range(8))] * 4, {"gpus": ["a", "b", "a", "b"]}, "got 4 ranks on 2 GPUs .*start 2"),
        ([set(range(8))] * 4, {"gpus": list("abcd")}, None),
    ],
)
def test_advice(monkeypatch, cores, options, words):
    node = Node(monkeypatch, cores, **options)
    line = advice(node, CPU)
    assert (line is None) if words is None else re.match(f"advice: {words}", line)
    monkeypatch.setenv("HPCINFER_OVERSUBSCRIBE", "yes")
    assert advice(node, CPU) is None


def test_advice_is_printed_once(tmp_path):
    (tmp_path / "in.txt").write_text("a\n")
    ranks = len(node.cores()) + 1
    if ranks > 4:
        pytest.skip("as many ranks as cores would be too many here")
    command = (
        sys.executable, "-m", "hpcinfer", "score", ROOT / "data" / "model", "--input",
        tmp_path / "in.txt", "--output", tmp_path / "out.jsonl", "--kv-memory", "16M",
    )  # fmt: skip
    done = run_job(ranks, *command, HPCINFER_OVERSUBSCRIBE="")
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^advice: got \d+ ranks on \d+ cores", done.stderr, re.MULTILINE)) == 1


@pytest.mark.parametrize(
    ("ranks", "environment", "threads"),
    [
        (1, {"SLURM_CPUS_PER_TASK": "3"}, "3"),
        (2, {"OMP_NUM_THREADS": "5", "SLURM_CPUS_PER_TASK": "3"}, "5"),
        (100_000, {}, "1"),
        (2, {"SLURM_JOB_NUM_NODES": "2"}, None),
    ],
)
def test_threads_per_rank_come_from_the_allocation(ranks, environment, threads):
    """--cpus-per-task, else the cores of the node divided among its ranks; for every library."""
    script = f"source jobs/site.sh; n=$(site_cores); site_settings {ranks} 2>/dev/null; "
    script += "echo $n $OMP_NUM_THREADS $OPENBLAS_NUM_THREADS $MKL_NUM_THREADS"
    done = subprocess.run(
        ["bash", "-c", script], cwd=ROOT, capture_output=True, text=True,
        env=clean_environment() | environment,
    )  # fmt: skip
    cores, *found = done.stdout.split()
    assert found == [threads or cores] * 3


@pytest.mark.parametrize(
    ("kind", "others", "taken"),
    [
        ("script", {}, "mpiexec.hydra"),
        ("script", {"PE_HOSTFILE": "hosts"}, "mpirun"),
        ("program", {}, "mpirun"),
        ("script alone", {}, "mpirun"),
    ],
)
def test_a_launcher_that_hands_signals_on_is_taken(tmp_path, kind, others, taken):
    """Intel's mpirun is a script, which ends without its ranks; MPICH's own is a program."""
    for name in ("mpirun", "mpiexec.hydra")[: 1 if kind == "script alone" else 2]:
        (tmp_path / name).write_text("\x7fELF" if kind == "program" else "#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", "source jobs/site.sh; site_mpirun"], cwd=ROOT, capture_output=True,
        text=True, env=clean_environment() | others | {"PATH": path},
    )  # fmt: skip
    assert done.stdout.strip() == str(tmp_path / taken), done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("generate", "MODEL", "--lay", "tp=1"),
        ("generate", "MODEL", "--max", "5"),
        ("bench", "decode", "config.json", "--rep", "2"),
        ("generate", "MODEL", "--sequences", "\u0664"),
        ("generate", "MODEL", "--shard", "\u0661/\u0662"),
        ("generate", "MODEL", "--max-tokens", "\u0664"),
        ("generate", "MODEL", "--max-tokens", "1_000"),
        ("generate", "MODEL", "--temperature", "\u0661.5"),
        ("generate", "MODEL", "--kv-memory", "1_0M"),
        ("generate", "MODEL", "--time-limit", "\u0661"),
        ("generate", "MODEL", "--time-limit", "1:2:3:4"),
        ("generate", "MODEL", "--time-limit", "-5"),
        ("generate", "MODEL", "--time-limit", "0"),
    ],
)
def test_names_and_numbers_are_written_out(words):
    with pytest.raises(UsageError, match=f"^(got the unknown option|argument) {words[-2]}"):
        parser().parse_args(words)


def test_a_length_is_written_in_plain_digits():
    with pytest.raises(UsageError, match="need a length of 1 or more"):
        parse_layout("tp=\u0664", 4)


@pytest.mark.parametrize(
    ("nodes", "tp", "words"),
    [
        ([0, 0, 2, 2], [[0, 1], [2, 3]], None),
        ([0, 1, 0, 1], [[0, 1], [2, 3]], "2 ranks of tp on 2 nodes.*srun -m block"),
        ([0, 0, 0, 3, 3, 3], [[0, 1], [2, 3], [4, 5]], "a tp that divides 3"),
        ([0, 0, 2, 2], [[0, 1, 2, 3]], None),
    ],
)
def test_ranks_of_tp_apart_are_told(monkeypatch, nodes, tp, words):
    """Nodes by the number of their first rank, in the order of ranks; groups of tp."""
    monkeypatch.delenv("HPCINFER_OVERSUBSCRIBE", raising=False)
    apart = [len({nodes[rank] for rank in group}) for group in tp]
    answers = iter([nodes, apart])
    grid = SimpleNamespace(
        comm=SimpleNamespace(rank=0, allgather=lambda own: next(answers), Get_name=str),
        node=SimpleNamespace(bcast=lambda first: first),
        tp=SimpleNamespace(
            size=len(tp[0]), allgather=lambda own: [nodes[rank] for rank in tp[0]], Get_name=str
        ),
    )
    line = spread_advice(grid)
    assert (line is None) == (words is None)
    assert words is None or re.search(words, line)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("genrate",), "got 'genrate', need one of .*did you mean generate"),
        (("generate", "MODEL", "--inptu", "x"), "unknown option --inptu, .*did you mean --input"),
        (("generate", "M", "--max_tokens=5"), "unknown option --max_tokens, .*mean --max-tokens"),
        (("bench", "decod"), "got 'decod', need one of .*did you mean decode"),
        (("score", "M", "--dtype", "bfloat"), "got 'bfloat', need one of .*did you mean bfloat16"),
        (("convert", "M", "N", "--qauntize", "int8"), "did you mean --quantize"),
    ],
)
def test_what_was_meant_is_named(words, message):
    with pytest.raises(UsageError, match=message):
        parser().parse_args(words)


def test_what_was_meant_in_files_is_named():
    with pytest.raises(ValueError, match="unknown field 'max_token', .*did you mean max_tokens"):
        check_names({"prompt": "a", "max_token": 5})
    with pytest.raises(ValueError, match="got model_type 'qwen_2', .*did you mean qwen2"):
        read_architecture({"model_type": "qwen_2"})


def leaves(of):
    """Every parser that has no others below it."""
    below = [a for a in of._actions if isinstance(a, argparse._SubParsersAction)]
    if not below:
        yield of
    for action in below:
        for one in action.choices.values():
            yield from leaves(one)


def test_help_says_of_every_option_what_holds_without_it():
    for one in leaves(parser()):
        entries = re.split(r"\n  (?=-)", one.format_help())
        for action in one._actions:
            if action.option_strings and action.nargs != 0 and not action.required:
                name = action.option_strings[-1]
                [entry] = [e for e in entries if re.match(rf"{name}\b(?!-)", e)]
                assert "default" in entry, (one.prog, name)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("1.5", 1.5), ("2:30", 150), ("1:00:01", 3601), ("1-00", 86400)]
    + [("2-12:30", 217800), ("1-00:00:30", 86430), ("0-00:01:00", 60)],
)
def test_times_are_written_as_slurm_has_them(text, seconds):
    assert duration(text) == seconds
