"""What ``gpu_all.py`` runs: correctness, invariances and speed of every backend, in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gpu_proof_table import TABLE, Configuration

BACKENDS = ("triton", "fa3", "flashinfer")
PAIRS = ("prefill=fa3,decode=triton", "prefill=flashinfer,decode=triton")
WORKLOADS = "256:1024:512,64:512:256,1:512:256,64:2048:1,1:32000:128,16:8000:128"
_SHAPE = ("--device", "cuda", "--model-config", "qwen3-8b", "--load-format", "random")
_ALL = float("inf")


@dataclass(frozen=True, slots=True)
class Task:
    """One command.

    command: without the interpreter; ``{folder}`` stands for the folder of the results
    result:  the file there that gets what the command prints, where that is what is kept
    timed:   whether it is a measurement
    timeout: seconds

    The rest is of ``gpu_lanes.Work``.
    """

    name: str
    command: tuple[str, ...]
    result: str = ""
    timed: bool = False
    memory: float = 24
    after: str = ""
    timeout: float = 3000


def tasks(cores: int) -> list[Task]:
    """All of them, those that others wait for first.

    :param cores: of the machine; kernels are compiled on a part of them.
    """
    return [*_kernels(cores), *_correctness(cores), *_speed()]


def _kernels(cores: int) -> Iterator[Task]:
    script = ("benchmarks/flashinfer_kernels.py", "--jobs", str(max(1, cores // 2)))
    yield Task("kernels of flashinfer", script)


def _correctness(cores: int) -> Iterator[Task]:
    jobs = str(max(1, min(16, cores // 4)))
    for backend in (*BACKENDS, "torch"):
        quick = ("--quick",) if backend == "torch" else ()  # all of it takes long
        yield Task(
            f"conformance of {backend}",
            _isobit(
                *("plugins", "test", backend, "--device", "cuda", "--jobs", jobs, *quick),
                *("--save", f"{{folder}}/{backend}-cuda.json"),
            ),
            after=_needs(backend),
        )
    pytest = ("-m", "pytest", "-q", "-rs")
    workers = ("-n", str(min(8, max(1, cores // 4))))
    yield Task("mutants", (*pytest, *workers, "tests/plugins/test_mutants.py"))
    yield Task("GPU tests", (*pytest, *workers, "-m", "gpu and not whole_gpu", "tests"))
    yield Task("GPU tests alone", (*pytest, "-m", "whole_gpu", "tests"), memory=_ALL)
    for configuration in sorted(TABLE, key=lambda c: -c.memory):
        yield _verify(configuration)


def _verify(configuration: Configuration) -> Task:
    file = "".join(c if c.isalnum() else "-" for c in configuration.name)
    return Task(
        f"verify of {configuration.name}",
        (
            *("benchmarks/gpu_proof.py", "--configuration", configuration.name),
            *("--timeout", "900", "--output", f"{{folder}}/verify-{file}.json"),
        ),
        memory=configuration.memory,
        after=_needs(configuration.backend),
    )


def _speed() -> Iterator[Task]:
    for backend in (*BACKENDS, *PAIRS):
        named = ("--attention-backend", backend)
        compared = ("--compare",) if backend == "triton" else ()
        suffix = "" if backend == "triton" else f"-{_spelt(backend)}"
        yield Task(
            f"throughput of {backend}",
            _isobit(
                *("bench", "throughput", *_SHAPE, *named, "--workloads", WORKLOADS),
                *(*compared, "--json"),
            ),
            f"h200-qwen3-8b-throughput{suffix}.jsonl",
            timed=True,
            after=_needs(backend),
        )
        yield Task(
            f"turns of {backend}",
            _isobit("bench", "turns", *_SHAPE, *named, "--json"),
            f"h200-turns-{_spelt(backend)}.jsonl",
            timed=True,
            after=_needs(backend),
        )
    yield Task(
        "start-up",
        _isobit("bench", "startup", *_SHAPE, "--json"),
        "h200-qwen3-8b-startup.jsonl",
        timed=True,
    )
    for phase, sizes in (
        ("decode", ("--batch", "256", "--context", "1024")),
        ("prefill", ("--phase", "prefill", "--batch", "8", "--tokens", "1024")),
    ):
        yield Task(
            f"a step of {phase}",
            _isobit("bench", "step", *_SHAPE, *sizes, "--json"),
            f"h200-qwen3-8b-steps-{phase}.jsonl",
            timed=True,
        )


def _isobit(*arguments: str) -> tuple[str, ...]:
    return ("-m", "isobit.cli.main", *arguments)


def _needs(backend: str) -> str:
    return "kernels of flashinfer" if "flashinfer" in backend else ""


def _spelt(backend: str) -> str:
    """As the files are called: ``fa3-triton`` of the pair."""
    return backend.replace("prefill=", "").replace(",decode=", "-")
