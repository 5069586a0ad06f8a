"""Drives an engine through a workload, step by step, with every knob a proof needs to turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..core.engine import Engine
from ..core.outputs import RequestOutput
from .transcript import Transcript, transcripts
from .workload import Case

Budget = Callable[[int], int | None]
"""Token budget by step number; None keeps the engine's own."""

Hook = Callable[[Engine, int], None]
"""Called before every step with the engine and the step's number."""


def drive(
    engine: Engine,
    cases: Sequence[Case],
    *,
    order: Sequence[int] | None = None,
    arrive: Callable[[int], int] = lambda place: 0,
    budget: Budget = lambda step: None,
    before_step: Hook = lambda engine, step: None,
) -> list[RequestOutput]:
    """Run all cases to the end and return their outputs in the order of ``cases``.

    :param order: indices into ``cases`` in order of submission.
    :param arrive: the step at which the case at a place of ``order`` is submitted.
    """
    waiting = list(enumerate(order if order is not None else range(len(cases))))
    outputs: dict[str, RequestOutput] = {}
    step = 0
    while waiting or engine.has_unfinished():
        due = [(place, index) for place, index in waiting if arrive(place) <= step]
        waiting = [entry for entry in waiting if entry not in due]
        for _, index in due:
            case = cases[index]
            engine.add_request(f"verify-{index}", case.prompt_token_ids, case.params)
        before_step(engine, step)
        for chunk in engine.step(budget(step)):
            if chunk.output is not None:
                outputs[chunk.request_id] = chunk.output
        step += 1
    return [outputs[f"verify-{index}"] for index in range(len(cases))]


def drive_alone(engine: Engine, cases: Sequence[Case]) -> list[RequestOutput]:
    """Each case by itself on a cold cache: what every other run is compared with."""
    outputs = []
    for index, case in enumerate(cases):
        engine.flush_cache()
        engine.add_request(f"verify-{index}", case.prompt_token_ids, case.params)
        while engine.has_unfinished():
            outputs += [c.output for c in engine.step() if c.output is not None]
    engine.flush_cache()
    return outputs


def as_transcripts(outputs: Sequence[RequestOutput]) -> list[Transcript]:
    """One transcript a case (the proofs ask for one choice each)."""
    return [transcripts(output)[0] for output in outputs]
