"""What a job says of its requests at the end, and what a failed one leaves behind."""

import math
import time
from types import SimpleNamespace

import pytest

from hpcinfer.job import start
from hpcinfer.job.tally import Tally

TEXT = SimpleNamespace(decode=lambda ids, after_text: "é" * len(ids))


def answer(n_prompt, n_new, reason="length"):
    choice = {"finish_reason": reason, "token_ids": [1] * n_new}
    return {"error": None, "prompt_token_ids": [1] * n_prompt, "choices": [choice]}


@pytest.mark.single
def test_refusals_are_counted_and_the_first_are_shown():
    tally = Tally(TEXT, 64)
    assert tally.lines() == []
    for line in range(5):
        tally.add({"error": f"request: got {line}", "line": line, "choices": []})
    lines = tally.lines()
    assert lines[0] == "refused   5 requests; the first of them" and len(lines) == 4
    assert lines[1].strip() == "line 0: request: got 0"


@pytest.mark.single
def test_answers_that_were_cut_are_told_apart():
    tally = Tally(TEXT, 64)
    for record in (answer(60, 4), answer(10, 8), answer(10, 8), answer(63, 1, "stop")):
        tally.add(record)
    [line] = tally.lines()
    assert "2 answers at their max_tokens, 1 at the end of the context window of 64" in line


@pytest.mark.single
def test_the_perplexity_is_that_of_all_tokens_together():
    tally = Tally(TEXT, 64)
    for n, logprob in ((5, -8.0), (3, -1.0), (1, 0.0)):
        tally.add({"error": None, "token_ids": [1] * n, "sum_logprob": logprob})
    [line] = tally.lines()
    bits = 9 / math.log(2) / (6 * len("é".encode()))
    assert f"2 texts, 6 tokens: perplexity {math.exp(1.5):.4g}, {bits:.4g} bits a byte" in line


@pytest.mark.single
def test_the_end_of_another_job_is_not_kept_to(monkeypatch, capsys):
    now_s = int(time.time())
    for end_s, limit_s, expected in (
        (now_s - 5, None, None),
        (now_s - 5, 100, now_s + 100),
        (now_s + 500, None, now_s + 470),
        (now_s + 5, None, now_s - 25),
    ):
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(end_s))
        found = start._end_s(limit_s)
        assert (found is None) == (expected is None)
        assert expected is None or abs(found - expected) < 3
        assert ("is past" in capsys.readouterr().err) == (end_s < now_s)
