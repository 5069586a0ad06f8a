"""An engine on the flashinfer backend over the fake: steps ahead, graphs, and what is reused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from isobit import SamplingParams
from isobit.core.config import EngineConfig
from isobit.core.engine import Engine
from isobit.core.graphs import DecodeGraphs
from isobit.core.startup import start_engine
from isobit.plugins import hookimpl
from isobit.plugins.discovery import Candidate
from isobit.plugins.manager import PluginHost
from isobit.verify.drive import as_transcripts, drive, drive_alone
from isobit.verify.workload import Case

PAGE = 8
CASES = [
    Case(
        f"case {index}",
        tuple(3 + (index * 7 + place) % 50 for place in range(1 + 9 * index)),
        SamplingParams(max_tokens=4 + 3 * index, temperature=index % 2, seed=index, logprobs=2),
    )
    for index in range(6)
]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def start(ours, spec):
    """Starts an engine on a CPU, as the declaration would have it on a GPU."""
    here = replace(
        spec.capabilities,
        devices={"cpu"},
        dtypes={"float32"},
        head_dims=None,
        compute_capability=None,
    )

    class Plugin:
        @hookimpl
        def isobit_attention_backends(self):
            return [replace(spec, requires=(), capabilities=here)]

    def start(graphs: bool = False, **options) -> Engine:
        config = EngineConfig(
            model="tiny-qwen3",
            load_format="random",
            attention_backend="flashinfer",
            device="cpu",
            dtype="float32",
            kernels="torch",
            max_model_len=160,
            page_size=PAGE,
            **options,
        )
        host = PluginHost(candidates=[Candidate("flashinfer", "isobit", "0", "", Plugin)])
        engine, _ = start_engine(config, host)
        if graphs:  # the matrix refuses them on a CPU, where they are tapes
            runner = engine.runner
            hidden_size = runner.decoder.config.hidden_size
            runner.graphs = DecodeGraphs(runner.backend, runner.compute, (1, 2, 4), hidden_size)
        return engine

    return start


@pytest.fixture
def expected(start):
    return as_transcripts(drive_alone(start(), CASES))


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("ahead", [False, True])
def test_every_request_has_the_bits_it_has_alone(start, expected, graphs, ahead) -> None:
    engine = start(graphs, async_scheduling=ahead, max_num_batched_tokens=32)
    for arrive in (lambda place: 0, lambda place: 3 * place):
        assert as_transcripts(drive(engine, CASES, arrive=arrive)) == expected
        engine.flush_cache()


def test_the_engine_shows_bits_that_follow_the_batch(start, expected) -> None:
    """The control: the same engine where FlashInfer chooses."""
    engine = start(deterministic=False)
    together = as_transcripts(drive(engine, CASES))
    engine.flush_cache()
    assert together != as_transcripts(drive_alone(engine, CASES))


def test_a_second_turn_reuses_what_prefill_wrote_and_no_more(start) -> None:
    prompt = tuple(3 + place % 50 for place in range(40))
    params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, logprobs=1)
    engine = start()
    (first,) = drive(engine, [Case("first", prompt, params)])
    again = (*prompt, *first.outputs[0].token_ids, 5, 6, 7)
    (second,) = drive(engine, [Case("second", again, params)])
    assert second.num_cached_tokens == len(prompt)  # of 70 tokens that lie in the cache
    engine.flush_cache()
    (cold,) = drive(engine, [Case("second", again, params)])
    assert cold.num_cached_tokens == 0
    assert as_transcripts([cold]) == as_transcripts([second])
