"""Hard states: what an engine refuses, what it survives, and that its bits stay the same.

Every refusal is tested once, where it is made; here is what only the whole engine shows.

| state | tested in |
|---|---|
| empty prompt, token id out of range, prompt or output over the context | ``test_llm`` |
| the same while others run, with the same bits afterwards | here |
| ``max_tokens=0``, NaN temperature, ``top_p`` 0 or 2, unknown name | ``sampling/test_params`` |
| a ``min_tokens`` that leaves no token to sample, wrong types, ids that are no strings | here |
| unknown engine option, option out of range, closed engine | ``test_llm`` |
| option of a wrong type, more KV cache than memory | here |
| unknown backend, missing library, failing import: the choice | ``plugins/test_backend_*`` |
| the same from ``LLM``, with a distribution on ``sys.path`` | here |
| folder without config, foreign or truncated weights, architecture | ``models/test_model_*`` |
| the same from ``LLM``; sizes that no model has | here |
| cache too small for one request, duplicate id | ``scheduler/test_scheduler_lifecycle`` |
| the same from ``LLM``; everything preempted again and again | here |
| 5,000 requests at once, 8,000 tokens among 200 short prompts | here |
| abort of what is unknown or finished | here |
| a step's cost with many waiting | ``scheduler/test_scheduler_rules``, ``test_engine_costs`` |
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from isobit import LLM, SamplingParams
from isobit.errors import ConfigError, RequestError
from isobit.verify.transcript import Transcript, transcripts

MIXED = SamplingParams(max_tokens=10, ignore_eos=True, logprobs=2, prompt_logprobs=0)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def small(small_folder: Path) -> Iterator[LLM]:
    with LLM(str(small_folder), max_model_len=256) as llm:
        yield llm


def alone(llm: LLM, prompt: list[int], params: SamplingParams) -> list[Transcript]:
    llm.engine.flush_cache()
    return transcripts(llm.generate([prompt], params, use_tqdm=False)[0])


def finish(llm: LLM) -> dict[str, list[Transcript]]:
    """Step to the end; the outputs by id."""
    outputs = {}
    while llm.engine.has_unfinished():
        for chunk in llm.engine.step():
            if chunk.output is not None:
                outputs[chunk.request_id] = transcripts(chunk.output)
    return outputs


REFUSED: tuple[tuple[Callable[[LLM], object], str], ...] = (
    (lambda llm: llm.generate([[]]), r"no tokens; wanted at least 1\. Give"),
    (lambda llm: llm.generate([[3, 64]]), r"token 1 was 64; wanted a token id from 0 to 63"),
    (lambda llm: llm.generate([[3] * 256]), r"has 256 tokens; .* at most 255 .* Shorten"),
    (lambda llm: llm.generate([[3] * 250]), r"max_tokens is 16, .* is 256\. Lower max_tokens to 6"),
    (
        lambda llm: llm.generate(
            [[3]], SamplingParams(min_tokens=1, stop_token_ids=list(range(64)))
        ),
        r"min_tokens: wanted 0 where every token .* ends the output, given 1\. Stop at fewer",
    ),
    (lambda llm: llm.generate(5), r"prompts was of type int; wanted a text, .* Pass list"),
    (lambda llm: llm.generate([[3]], {"top_k": 1}), r"was \{'top_k': 1\}; wanted .*\.from_mapping"),
    (lambda llm: llm.generate([[3]], [None]), r"was \[None\]; wanted a SamplingParams"),
    (lambda llm: llm.engine.add_request(7, [3], MIXED), r"id 7 was given; wanted a string\. Pass"),
    (lambda llm: llm.engine.add_request("running", [3], MIXED), r"'running' is in use\. Pass"),
    (lambda llm: llm.engine.step(0), r"token_budget was 0; wanted .* at least 1\. Leave it out"),
    (lambda llm: llm.engine.step(1.5), r"token_budget was 1\.5; wanted a whole number"),
)


@pytest.mark.parametrize(
    ("call", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_refusal_leaves_the_others_alone(
    small: LLM, call: Callable[[LLM], object], message: str
) -> None:
    expected = alone(small, [3, 4, 5, 6, 7], MIXED)
    small.engine.flush_cache()
    small.engine.add_request("running", [3, 4, 5, 6, 7], MIXED)
    small.engine.step(3)  # amid its prompt
    with pytest.raises((RequestError, ConfigError), match=message):
        call(small)
    assert small.engine.unfinished_ids() == ["running"]
    assert small.engine.scheduler.num_waiting == 0
    small.engine.scheduler.check_integrity()
    assert finish(small) == {"running": expected}


def test_aborting_what_is_not_there(small: LLM) -> None:
    small.engine.add_request("a", [3], MIXED)
    (finished,) = finish(small)
    assert not small.engine.abort(finished)
    assert not small.engine.abort("never seen")
    assert small.engine.preempt(finished) == small.engine.preempt("never seen") == 0
    small.engine.add_request("a", [3], MIXED)  # a finished id is free again
    assert small.engine.abort("a")
    assert not small.engine.abort("a")
    assert small.engine.step() == []
    small.engine.scheduler.check_integrity()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"deterministic": "no"}, r"deterministic was 'no'; wanted one of True, False"),
        ({"deterministic": None}, r"deterministic was None; wanted one of True, False"),
        ({"strict_plugins": 1}, r"strict_plugins was 1; wanted one of True, False"),
        ({"attention_backend": None}, r"attention_backend was None; wanted a string\. Pass"),
        ({"model": 5}, r"model was 5; wanted a string\. Pass"),
        ({"kv_cache_memory": "100TB"}, r"109951162777600 bytes .* Lower kv_cache_memory"),
        ({"attention_backend": "nope"}, r"(?s)nope.*torch"),
    ],
)
def test_options_of_the_wrong_kind(
    small_folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(**({"model": str(small_folder)} | options))


def test_a_folder_may_be_a_path(small_folder: Path) -> None:
    with LLM(small_folder) as llm:  # type: ignore[arg-type]
        assert str(small_folder) in str(llm.report)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"wanted config\.json in"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"wanted model\.safetensors or"),
        (lambda folder: cut(folder / "model.safetensors"), r"not a whole .* download it again"),
        (lambda folder: configure(folder, hidden_size=64), r"do not fit its config: .* misshapen"),
        (
            lambda folder: configure(folder, architectures=["MambaForCausalLM"]),
            r"says MambaForCausalLM; supported are LlamaForCausalLM, Qwen3ForCausalLM",
        ),
        *(
            (
                lambda folder, name=name, size=size: configure(folder, **{name: size}),
                rf"{name}={size} \(wanted at least 1\)",
            )
            for name in ("vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim")
            for size in (0, -2)
        ),
        (lambda folder: configure(folder, hidden_size=0), r"hidden_size=0 \(wanted at least 1\)"),
        (lambda folder: configure(folder, rms_norm_eps=-1.0), r"rms_norm_eps=-1\.0 \(wanted a"),
        (lambda folder: configure(folder, rope_theta=0), r"rope_theta=0 .* wanted a finite"),
        (lambda folder: configure(folder, rope_theta="x"), r"rope_theta='x' .* wanted a finite"),
        (lambda folder: configure(folder, eos_token_id=64), r"eos_token_id=64 .* from 0 to 63\. C"),
        (
            lambda folder: (folder / "generation_config.json").write_text(
                '{"eos_token_id": ["x"]}'
            ),
            r"eos_token_id=\['x'\] .* wanted token ids from 0 to 63",
        ),
    ],
)
def test_folders_that_hold_no_model(
    small_folder: Path, tmp_path: Path, change: Callable[[Path], object], message: str
) -> None:
    folder = shutil.copytree(small_folder, tmp_path / "model")
    change(folder)
    with pytest.raises(ConfigError, match=message):
        LLM(str(folder))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def configure(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


PLUGIN = """
from isobit.plugins import BackendSpec, Capabilities, Supported, hookimpl
{before}
@hookimpl
def isobit_attention_backends():
    features = ("chunked_prefill", "radix_cache", "non_greedy_sampling")
    return [BackendSpec(
        name="foreign", api=1, factory="{factory}", requires=({requires}), install="{install}",
        capabilities=Capabilities(
            dtypes={{"float32"}}, devices={{"cpu"}},
            features={{name: Supported() for name in features}},
            deterministic=True, chunk_invariant=True, decode_equals_prefill=True,
        ),
    )]
"""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            {"requires": "'no-such-kernels>=2',"},
            r"(?s)'foreign'.*no-such-kernels.*pip install them",
        ),
        ({"factory": "no_such_module:Backend"}, r"'foreign'.*no_such_module.*pip install them"),
        ({"before": "raise RuntimeError('no driver')"}, r"(?s)foreign.*no driver"),
    ],
)
def test_a_plugin_that_cannot_serve_is_named(
    small_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: dict[str, Any],
    message: str,
) -> None:
    """A distribution on ``sys.path``; without asking for its backend the engine runs as ever."""
    info = tmp_path / "foreign_kernels-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign-kernels\nVersion: 1.0\n")
    module = re.sub(r"\W", "_", f"foreign_{sorted(source)[0]}")
    (info / "entry_points.txt").write_text(f"[isobit.plugins]\nforeign = {module}\n")
    plain = {"before": "", "factory": "x:Y", "requires": "", "install": "pip install them"}
    (tmp_path / f"{module}.py").write_text(PLUGIN.format(**(plain | source)))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=message):
        LLM(str(small_folder), attention_backend="foreign")
    with LLM(str(small_folder)) as llm, LLM(str(small_folder), disable_plugins=("foreign",)) as own:
        assert alone(llm, [3, 4], MIXED) == alone(own, [3, 4], MIXED)


def test_a_cache_too_small_for_one_request(small_folder: Path, small: LLM) -> None:
    page = 16 * 2 * 2 * 16 * 4
    too_small = r"holds 2 pages .* = 33 tokens takes 3 .* kv_cache_memory, or .* at most 32\."
    with pytest.raises(ConfigError, match=too_small):
        LLM(str(small_folder), max_model_len=33, kv_cache_memory=2 * page)
    with LLM(str(small_folder), max_model_len=32, kv_cache_memory=2 * page) as llm:
        assert alone(llm, [3] * 20, MIXED) == alone(small, [3] * 20, MIXED)


@pytest.mark.parametrize("radix_cache", [True, False])
def test_everything_is_preempted_again_and_again(
    small_folder: Path, small: LLM, radix_cache: bool
) -> None:
    """Sixteen at once where there is room for one; on top, every third step preempts one."""
    params = SamplingParams(max_tokens=60, ignore_eos=True, logprobs=1)
    prompts = [[3, 4, 5, index] for index in range(16)]
    page = 2 * 2 * 2 * 16 * 4
    with LLM(
        str(small_folder),
        max_model_len=64,
        page_size=2,
        kv_cache_memory=32 * page,
        radix_cache=radix_cache,
    ) as llm:
        for index, prompt in enumerate(prompts):
            llm.engine.add_request(str(index), prompt, params)
        outputs: dict[str, list[Transcript]] = {}
        for number in range(10_000):
            running = llm.engine.scheduler.running
            if len(running) > 1 and number % 3 == 0:
                llm.engine.preempt(running[-1].request_id.rpartition("#")[0])
            for chunk in llm.engine.step():
                if chunk.output is not None:
                    outputs[chunk.request_id] = transcripts(chunk.output)
            if not llm.engine.has_unfinished():
                break
        assert llm.engine.scheduler.stats.preemptions > 60
        llm.engine.scheduler.check_integrity()
    for index, prompt in enumerate(prompts):
        assert outputs[str(index)] == alone(small, prompt, params)


def test_five_thousand_requests_at_once(small: LLM) -> None:
    prompts = [[3 + index % 50, 3 + index % 7] for index in range(5_000)]
    params = SamplingParams(max_tokens=2, logprobs=0)
    outputs = small.generate(prompts, params, use_tqdm=False)
    expected = {tuple(p): alone(small, p, params) for p in prompts[:350]}
    assert all(transcripts(o) == expected[o.prompt_token_ids] for o in outputs)


def test_a_long_prompt_among_short_ones(small_folder: Path) -> None:
    long = [3 + index * index % 61 for index in range(8_000)]
    short = [[3 + index % 60, index % 5] for index in range(200)]
    params = SamplingParams(max_tokens=6, logprobs=1)
    with LLM(str(small_folder), max_model_len=16_384, max_num_batched_tokens=512) as llm:
        prompts = [*short[:100], long, *short[100:]]
        for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
            assert transcripts(output) == alone(llm, prompt, params)
