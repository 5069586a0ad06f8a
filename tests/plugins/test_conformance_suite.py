"""The suite's machinery: schedules, tapes, references, verdicts. Its checks: test_mutants.py."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from isobit.backends.capabilities import BackendSpec, Capabilities, Supported
from isobit.backends.recording import record
from isobit.errors import BackendError, ConfigError
from isobit.plugins.conformance.check import Check, Context, Finding
from isobit.plugins.conformance.corners import Corners
from isobit.plugins.conformance.judge import Judge
from isobit.plugins.conformance.mutants.right import RightAttention
from isobit.plugins.conformance.proof import make_proof
from isobit.plugins.conformance.reference import attend
from isobit.plugins.conformance.scenario import (
    Geometry,
    Piece,
    Run,
    Sequence,
    Trial,
    alone,
    chunks,
    then_decode,
    together,
    whole,
)
from isobit.plugins.conformance.subject import Subject
from isobit.plugins.conformance.suite import run_check
from isobit.plugins.conformance.text import proof_table, verdict
from isobit.plugins.conformance.values import KINDS, all_rows
from isobit.plugins.conformance.waivers import parse_waivers
from isobit.plugins.manager import PluginHost

CPU = torch.device("cpu")
COUNTS = torch.tensor([1, 1, 2])
BYTES = torch.ones(3, dtype=torch.uint8)


def test_steps_have_decodes_first_and_come_late_where_asked() -> None:
    steps = together(chunks(0, 9, (4, 6)), then_decode(1, 3, 5), delays=(0, 1))
    assert steps == (
        (Piece(0, 0, 4),),
        (Piece(0, 4, 6), Piece(1, 0, 3)),
        (Piece(1, 3, 4, decode=True), Piece(0, 6, 9)),
        (Piece(1, 4, 5, decode=True),),
    )
    assert alone(whole(0, 2), then_decode(1, 1, 2)) == (
        (Piece(0, 0, 2),),
        (Piece(1, 0, 1),),
        (Piece(1, 1, 2, decode=True),),
    )
    with pytest.raises(ConfigError, match="one row to decode"):
        Piece(0, 3, 5, decode=True)


@pytest.mark.parametrize("values", KINDS)
@pytest.mark.parametrize(("window", "cap"), [(None, None), (5, None), (None, 2.0)])
def test_the_reference_is_attention(values: str, window: int | None, cap: float | None) -> None:
    geometry = Geometry(num_q_heads=4, num_kv_heads=2, sliding_window=window, logit_soft_cap=cap)
    rows = all_rows([Sequence(length=40, values=values)], geometry)[0]
    positions = torch.arange(40)
    found = attend(rows, positions, geometry)
    hidden = positions[None] > positions[:, None]
    if window is not None:
        hidden |= positions[None] <= positions[:, None] - window
    q, k, v = (t.double().transpose(0, 1) for t in (rows.q, rows.k, rows.v))
    k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
    if cap is None:
        expected = scaled_dot_product_attention(q, k, v, attn_mask=~hidden)
    else:
        scores = cap * torch.tanh(q @ k.mT * 64**-0.5 / cap)
        expected = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v
    assert torch.allclose(found.out, expected.transpose(0, 1), rtol=1e-9, atol=1e-9)
    # The bound lets no wrong neighbour through; large scores have large roundings.
    share = 0.02 if values == "large" else 1e-3
    assert (found.bound < share * rows.v.double().abs().max()).all()


def test_prefixes_are_the_sources_tokens() -> None:
    pair = [Sequence(length=9), Sequence(length=12, seed=1, prefix_of=0, prefix=5)]
    one, other = all_rows(pair, Geometry())
    assert torch.equal(one.k[:5], other.k[:5])
    assert not torch.equal(one.k[5:9], other.k[5:9])


def test_a_tape_replays_on_the_same_tensors_and_freezes_the_host() -> None:
    x, out, length = torch.ones(4), torch.zeros(4), [2]

    def work() -> None:
        out.copy_(x * 2)
        out[: length[0]] += 1

    tape = record(work, CPU)
    x.fill_(5)
    length[0] = 4
    tape.replay()
    assert out.tolist() == [11, 11, 10, 10]  # new values, and the length of the recording


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (lambda x: x.sum().item(), "waits for the device"),
        (lambda x: torch.allclose(x, x), "waits for the device"),
        (lambda x: x.narrow(0, COUNTS[0], 1), "waits for the device"),
        (lambda x: x[x > 0], "sizes a tensor by values"),
        (lambda x: x[BYTES], "sizes a tensor by values"),
        (lambda x: x.index_put_((x > 0,), torch.zeros(3)), "sizes a tensor by values"),
        (lambda x: x.index_put((BYTES,), torch.zeros(3)), "sizes a tensor by values"),
        (lambda x: x.diag().__setitem__((x > 0, COUNTS), 0.0), "sizes a tensor by values"),
        (lambda x: x.nonzero(), "sizes a tensor by values"),
        (lambda x: torch.nonzero(x, out=torch.empty(3, 1, dtype=torch.int64)), "sizes a tensor"),
        (lambda x: torch.where(x > 0), "sizes a tensor by values"),
        (lambda x: x.masked_select(x > 0), "sizes a tensor by values"),
        (lambda x: x.repeat_interleave(COUNTS), "sizes a tensor by values"),
        (lambda x: torch.repeat_interleave(COUNTS), "sizes a tensor by values"),
        (lambda x: x.unique(), "sizes a tensor by values"),
        (lambda x: x.unique_consecutive(), "sizes a tensor by values"),
        (lambda x: COUNTS.bincount(), "sizes a tensor by values"),
        (lambda x: x.tensor_split(COUNTS), "sizes a tensor by values"),
    ],
)
def test_a_tape_refuses_what_no_graph_can_do(work, said) -> None:
    x = torch.ones(3)
    with torch.inference_mode(), pytest.raises(BackendError, match=said):
        record(lambda: work(x), CPU)


@pytest.mark.parametrize(
    "work",
    [
        lambda x: (x > 0)[COUNTS],
        lambda x: BYTES[COUNTS],
        lambda x: x.__setitem__(x > 0, 0.0),
        lambda x: x[None].__setitem__((slice(None), x > 0), 0.0),
        lambda x: x.index_put_((COUNTS,), torch.zeros(3)),
        lambda x: (x > 0).index_put_((COUNTS,), x > 0),
        lambda x: torch.where(x > 0, x, 0.0),
        lambda x: x.repeat_interleave(COUNTS, output_size=4),
        lambda x: x.repeat_interleave(2),
        lambda x: x.tensor_split([1, 2]),
        lambda x: x.narrow(0, 0, 1),
    ],
)
def test_a_tape_takes_what_a_graph_can_do(work) -> None:
    with torch.inference_mode():
        record(lambda: work(torch.ones(3)), CPU).replay()


@pytest.mark.parametrize(
    ("text", "said"),
    [("batch", "without a reason"), ("batch=  ", "without a reason"), ("bach=x", "Did you mean")],
)
def test_a_waiver_names_a_check_and_a_reason(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_waivers([text])
    assert parse_waivers(["batch = a = b"]) == {"batch": "a = b"}


def spec(**changes: object) -> BackendSpec:
    offers = Capabilities(
        dtypes={"float32"},
        devices={"cpu"},
        features={"chunked_prefill": Supported()},
        deterministic=True,
    )
    return BackendSpec(
        name="any", api=1, factory="any:Any", capabilities=replace(offers, **changes)
    )


def context(**changes: object) -> Context:
    subject = Subject(spec(**changes), RightAttention, "any-dist", "1.0", PluginHost())
    return Context(subject, Corners(subject.spec, "cpu", True), Judge(RightAttention), "any")


def check(*findings: Finding) -> Check:
    return Check(
        "batch", "what", ("deterministic",), lambda corners: None, lambda c: iter(findings)
    )


GOOD = Finding("good", ("deterministic",))
BAD = Finding("bad", ("dtypes",), "wrong bits", "program")


@pytest.mark.parametrize(
    ("findings", "waivers", "status", "cells"),
    [
        ([GOOD], {}, "passed", {"deterministic": "proved", "dtypes": "unproved"}),
        ([GOOD, BAD], {}, "failed", {"deterministic": "unproved", "dtypes": "failed"}),
        ([], {}, "failed", {"deterministic": "failed"}),
        ([GOOD], {"batch": "because"}, "waived", {"deterministic": "waived"}),
    ],
)
def test_a_cell_is_proved_only_by_trials_that_held(findings, waivers, status, cells) -> None:
    outcome = run_check(check(*findings), context(), waivers)
    assert outcome.status == status
    proof = make_proof(context(), [outcome], command="the command", seconds=1.23)
    assert {name: proof.cells[name].verdict for name in cells} == cells
    assert proof.cells["radix_cache"].verdict == "not declared"
    assert proof.holds == (status != "failed")
    assert ("FAILS" in verdict(proof)) == (status == "failed")
    if status == "waived":
        assert "because" in proof_table(proof)
        assert "1 waived" in verdict(proof)
    assert json.loads(json.dumps(proof.as_dict()))["device_type"] == "cpu"


def test_what_is_not_declared_is_not_judged() -> None:
    gated = replace(check(GOOD), gate=lambda corners: "not chunk_invariant")
    assert run_check(gated, context(), {}).status == "not declared"
    absent = replace(check(GOOD), elsewhere=lambda corners: "no GPU")
    outcome = run_check(absent, context(), {})
    assert (outcome.status, outcome.reason) == ("not here", "no GPU")


def test_cuts_keep_the_alignment_that_is_declared() -> None:
    corners = context(chunk_invariant=True, alignment=24).corners
    assert corners.cuts(1, 24, 25) == (24, 48)
    assert corners.reuse_boundary(1, 16) == 48
    assert corners.tried("page_sizes").endswith("tried")


def test_an_error_of_the_backend_is_its_answer() -> None:
    class Raises(RightAttention):
        def run(self, *arguments: object) -> None:
            raise KeyError("no such kernel")

    trial = Trial(
        label="one",
        cells=("contract",),
        geometry=Geometry(),
        sequences=(Sequence(length=3),),
        run=Run(steps=(whole(0, 3),)),
    )
    difference = Judge(Raises).judge(trial)
    assert difference is not None
    assert "it raised KeyError: 'no such kernel'" in difference.message
    assert Judge(RightAttention).judge(trial) is None
