"""Ask a real model a few questions in different batches, then prove that the bits are the same."""

from __future__ import annotations

import sys
import time

from isobit import LLM, SamplingParams
from isobit.core.chat import chat_tokens
from isobit.verify.judge import judge_all
from isobit.verify.restart import RestartSpec
from isobit.verify.table import table
from isobit.verify.transcript import transcripts
from isobit.verify.workload import make_cases

QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue? Answer in one sentence.",
    "Name three animals that live in the sea.",
)


def chat(llm: LLM, question: str) -> list[int]:
    """The question through the model's chat template, as token ids."""
    return chat_tokens(llm.tokenizer, [{"role": "user", "content": question}])


def main() -> int:
    began = time.perf_counter()
    with LLM("smollm2") as llm:
        print(f"{llm.report}\n({time.perf_counter() - began:.1f} s to start)\n")
        prompts = [chat(llm, question) for question in QUESTIONS]
        params = [
            SamplingParams(temperature=0, max_tokens=40, logprobs=1),
            SamplingParams(temperature=0.8, seed=1, top_p=0.9, max_tokens=40, logprobs=1),
            SamplingParams(temperature=1.0, top_k=40, max_tokens=40, logprobs=1),
        ]
        alone = []
        for question, prompt, param in zip(QUESTIONS, prompts, params, strict=True):
            print(f"> {question}")
            for chunk in llm.stream([prompt], param):
                print(chunk.text, end="", flush=True)
                if chunk.output is not None:
                    alone += transcripts(chunk.output)
            print("\n")
        together = llm.generate(prompts, params, use_tqdm=False)
        backwards = llm.generate(prompts[::-1], params[::-1], use_tqdm=False)[::-1]
        for outputs in (together, backwards):
            if [t for output in outputs for t in transcripts(output)] != alone:
                print("The answers in a batch are not the answers alone.")
                return 1
        print("The same answers, to the last bit of every logprob: alone, together, backwards.\n")
        cases = make_cases(
            llm.tokenizer,
            llm.engine.vocab_size,
            (1, 15, 64, 250),
            max_new_tokens=6,
            temperature=0.0,
            sampling_seed=None,
        )
        restart = RestartSpec({"model": "smollm2"}, _threads())
        verdicts = list(judge_all(llm.engine, cases, restart))
    print(table(verdicts))
    print(f"\n{time.perf_counter() - began:.0f} s in all")
    return 0 if all(verdict.holds for verdict in verdicts) else 1


def _threads() -> int:
    import torch

    return torch.get_num_threads()


if __name__ == "__main__":
    sys.exit(main())
