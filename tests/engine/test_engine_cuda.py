"""The engine on a GPU: every invariance, with graphs and without, and the CPU's own tokens."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from isobit import LLM, SamplingParams
from isobit.kernels.triton.linear import chooser
from isobit.models.registry import load_model_config
from isobit.models.shapes import SHAPES
from isobit.models.weights import random_weights
from isobit.verify.judge import judge_all
from isobit.verify.restart import RestartSpec
from isobit.verify.transcript import Transcript, transcripts
from isobit.verify.workload import make_cases, prompt_lengths

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PLAIN: dict[str, Any] = {
    "load_format": "random",
    "device": "cuda",
    "kv_cache_memory": "512MiB",
    "max_num_seqs": 48,
    "cuda_graph_max_bs": 16,
}
MODELS = (("tiny-qwen3", "bfloat16"), ("tiny-llama", "float32"), ("tiny-llama", "bfloat16"))


def prompts(count: int) -> list[list[int]]:
    return [[3 + (7 * i + j * j) % 900 for j in range(1 + 11 * i % 90)] for i in range(count)]


def sampled(count: int) -> list[SamplingParams]:
    """Other lengths, so that the batch shrinks through every captured size."""
    return [
        SamplingParams(
            max_tokens=5 + i, temperature=i % 2 * 0.9, seed=i, ignore_eos=True, logprobs=2
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize(("model", "dtype"), MODELS)
def test_every_invariance_holds(model: str, dtype: str, cuda_graph: bool) -> None:
    options = PLAIN | {"model": model, "dtype": dtype, "cuda_graph": cuda_graph}
    with LLM(**options) as llm:
        assert (llm.engine.runner.graphs is not None) == cuda_graph
        scheduler = llm.engine.scheduler
        lengths = prompt_lengths(
            quick=True,
            page_size=scheduler.pool.page_size,
            longest=scheduler.config.max_model_len - 40,
        )
        cases = make_cases(
            None,
            llm.engine.vocab_size,
            lengths,
            max_new_tokens=8,
            temperature=0.0,
            sampling_seed=None,
        )
        restart = RestartSpec(options, torch.get_num_threads())
        verdicts = list(judge_all(llm.engine, cases, restart, requests=40))  # 16 are captured
    assert {v.invariance: v.failure for v in verdicts if not v.holds} == {}
    assert all(v.skipped is None for v in verdicts)


@pytest.mark.parametrize(("model", "dtype"), MODELS)
def test_graphs_give_the_bits_of_eager_steps(model: str, dtype: str) -> None:
    """Through every captured size, with padding, and beyond the largest."""
    found: list[list[Transcript]] = []
    for cuda_graph in (False, True):
        with LLM(model, dtype=dtype, cuda_graph=cuda_graph, **PLAIN) as llm:
            used = replays(llm) if cuda_graph else Counter[int]()
            outputs = llm.generate(prompts(40), sampled(40), use_tqdm=False)
            found.append([t for output in outputs for t in transcripts(output)])
            llm.flush_cache()
            again = llm.generate(prompts(40), sampled(40), use_tqdm=False)
            assert [t for output in again for t in transcripts(output)] == found[-1]
    assert found[0] == found[1]
    assert set(used) == {1, 2, 4, 8, 16}


@pytest.mark.parametrize("chunk", [None, 50])
@pytest.mark.parametrize(("model", "dtype"), MODELS)
def test_pieces_give_the_bits_of_eager_steps(model: str, dtype: str, chunk: int | None) -> None:
    """Steps ahead; prefills alone, and in chunks of 50 tokens beside decodes, which fit a size."""
    found = []
    for most in (0, 64):
        options = PLAIN | {"cuda_graph_max_tokens": most, "max_num_batched_tokens": chunk}
        with LLM(model, dtype=dtype, async_scheduling=True, **options) as llm:
            used = piece_replays(llm)
            outputs = [
                output
                for count in (1, 3, 40)  # of 1 token, of 36, and of some chunk after chunk
                for output in llm.generate(prompts(count), sampled(count), use_tqdm=False)
            ]
            found.append([t for output in outputs for t in transcripts(output)])
        assert bool(used) == bool(most)
        assert all(tokens <= most for tokens in used)
    assert found[0] == found[1]


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_steps_ahead_give_the_bits_of_steps_that_wait(cuda_graph: bool) -> None:
    found = []
    for ahead in (False, True):
        options = PLAIN | {"cuda_graph": cuda_graph, "async_scheduling": ahead}
        with LLM("tiny-qwen3", dtype="bfloat16", **options) as llm:
            outputs = llm.generate(prompts(40), every_parameter(40), use_tqdm=False)
            found.append([transcripts(output) for output in outputs])
    assert found[0] == found[1]


def every_parameter(count: int) -> list[SamplingParams]:
    return [
        SamplingParams(
            max_tokens=5 + i,
            temperature=i % 3 * 0.6,
            top_k=(-1, 9)[i % 2],
            top_p=(1.0, 0.9)[i // 2 % 2],
            min_p=(0.0, 0.01)[i // 3 % 2],
            repetition_penalty=(1.0, 1.2)[i // 2 % 2],
            frequency_penalty=(0.0, 0.5)[i // 3 % 2],
            presence_penalty=(0.0, 0.2)[i // 5 % 2],
            logit_bias=(None, {7: 1.5, 9: -3.0})[i // 7 % 2],
            min_tokens=(0, 4)[i % 2],
            stop_token_ids=((), (11, 12, 13))[i // 2 % 2],
            logprobs=(None, 0, 3)[i % 3],
            prompt_logprobs=(None, None, None, 2)[i % 4],
            seed=i,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_a_launch_never_waits_for_the_device(
    cuda_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch raises where a call would. The first round, in which kernels are compiled and pinned
    memory is taken, is not watched; but no product is chosen in it."""
    with LLM("tiny-qwen3", dtype="bfloat16", **PLAIN | {"cuda_graph": cuda_graph}) as llm:
        products = chooser(llm.engine.runner.decoder.embed_tokens.device)
        chosen = set(products._chosen)
        expected = llm.generate(prompts(40), every_parameter(40), use_tqdm=False)
        assert set(products._chosen) == chosen
        llm.flush_cache()
        launch = llm.engine.runner.launch

        def watched(step: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                return launch(step)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        monkeypatch.setattr(llm.engine.runner, "launch", watched)
        again = llm.generate(prompts(40), every_parameter(40), use_tqdm=False)
        assert [transcripts(o) for o in again] == [transcripts(o) for o in expected]
        prepare = llm.engine.runner.prepare

        def waits(seqs: Any) -> Any:
            batch = prepare(seqs)
            batch.token_ids.sum().item()
            return batch

        monkeypatch.setattr(llm.engine.runner, "prepare", waits)
        with pytest.raises(RuntimeError, match="synchroniz"):  # the watch can tell
            llm.generate(prompts(2), sampled(2), use_tqdm=False)


def test_frozen_lengths_are_caught() -> None:
    """The negative control: graphs that keep the lengths of their capture."""
    with LLM("tiny-qwen3", dtype="bfloat16", **PLAIN) as llm:
        expected = [transcripts(o) for o in llm.generate(prompts(8), sampled(8), use_tqdm=False)]
        llm.flush_cache()
        graphs = llm.engine.runner.graphs
        assert graphs is not None
        for graph in graphs._graphs.values():
            object.__setattr__(graph.batch, "seq_lens", graph.batch.seq_lens.clone())
        broken = [transcripts(o) for o in llm.generate(prompts(8), sampled(8), use_tqdm=False)]
    assert broken != expected


def test_a_frozen_input_of_the_pieces_is_caught() -> None:
    """The negative control: pieces that keep one position whatever the step's are."""
    with LLM("tiny-qwen3", dtype="bfloat16", **PLAIN) as llm:
        expected = [transcripts(o) for o in llm.generate(prompts(8), sampled(8), use_tqdm=False)]
        llm.flush_cache()
        pieces = llm.engine.runner.pieces
        assert pieces is not None
        frozen = pieces._inputs["positions"].zero_()
        pieces._inputs["positions"] = frozen.clone()
        broken = [transcripts(o) for o in llm.generate(prompts(8), sampled(8), use_tqdm=False)]
    assert broken != expected


def replays(llm: LLM) -> Counter[int]:
    """Counts the replayed steps from now on, by captured size."""
    counts, graphs = Counter[int](), llm.engine.runner.graphs
    assert graphs is not None
    replay = graphs.replay

    def counting(batch: Any) -> torch.Tensor:
        counts[batch.num_seqs] += 1
        return replay(batch)

    graphs.replay = counting
    return counts


def piece_replays(llm: LLM) -> Counter[int]:
    """Counts the steps replayed in pieces from now on, by their tokens; none where there are no."""
    counts, pieces = Counter[int](), llm.engine.runner.pieces
    if pieces is not None:
        replay = pieces.replay

        def counting(batch: Any, attend: Any) -> torch.Tensor:
            counts[batch.num_tokens] += 1
            return replay(batch, attend)

        pieces.replay = counting
    return counts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of tiny-qwen3 in fp32, its matrices so large that attention decides."""
    folder = tmp_path_factory.mktemp("tiny-qwen3")
    (folder / "config.json").write_text(json.dumps(dict(SHAPES["tiny-qwen3"])))
    weights = random_weights(load_model_config("tiny-qwen3", random=True)[1], 0)
    for matrix in weights.values():
        if matrix.dim() == 2:
            matrix.mul_(4)
    save_file(weights, folder / "model.safetensors")
    return folder


def test_greedy_tokens_are_those_of_the_cpu(folder: Path) -> None:
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    found = []
    for device in ("cpu", "cuda"):
        with LLM(str(folder), device=device, kv_cache_memory="256MiB") as llm:
            outputs = llm.generate(prompts(12), params, use_tqdm=False)
            found.append([output.outputs[0].token_ids for output in outputs])
            parts = dict(llm.fingerprint_parts)
        assert parts["device"].startswith(device)
        assert ("triton" in parts) == (device == "cuda")
    assert found[0] == found[1]


def test_the_digest_of_a_checkpoint_does_not_know_the_device(folder: Path) -> None:
    digests = set()
    for device in ("cpu", "cuda"):
        with LLM(str(folder), device=device, kv_cache_memory="256MiB") as llm:
            digests.add(llm.fingerprint_parts["weights"])
    assert len(digests) == 1


def test_library_kernels_run() -> None:
    options = PLAIN | {"deterministic": False, "kernels": "library"}
    with LLM("tiny-qwen3", dtype="bfloat16", **options) as llm:
        outputs = llm.generate(prompts(20), sampled(20), use_tqdm=False)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [5 + i for i in range(20)]


@pytest.mark.whole_gpu
def test_the_cache_takes_its_share_and_the_report_says_so() -> None:
    options = {k: v for k, v in PLAIN.items() if k != "kv_cache_memory"}
    free, total = torch.cuda.mem_get_info()
    share = 1 - 0.7 * free / total  # three tenths of what is free
    with LLM("tiny-qwen3", gpu_memory_utilization=share, **options) as llm:
        used = total - torch.cuda.mem_get_info()[0]
        assert used <= (share + 0.05) * total
        rows = {row[0]: row for row in llm.report.rows}
        assert rows["device"][1] == "cuda"
        assert "KV" in rows["memory"][2]
        assert rows["CUDA graphs"][1] == "5 captured"
        assert llm.generate([5, 6], SamplingParams(max_tokens=2), use_tqdm=False)
