"""CTranslate2 as a side of bench_beam.py; side_transformers.py converts the model."""

from __future__ import annotations

import os
import time

import ctranslate2

from serving import serve


class Side:
    def start(self, device: str) -> dict:
        """The versions and the number of threads."""
        self.device, self.threads = device, len(os.sched_getaffinity(0))
        return {"versions": {"ctranslate2": ctranslate2.__version__}, "threads": self.threads}

    def load(self, folder: str, precision: str) -> None:
        """``folder`` has float32; CTranslate2 converts or quantises it as it loads."""
        self.generator = ctranslate2.Generator(
            folder, device=self.device, inter_threads=1, intra_threads=self.threads,
            compute_type={"bf16": "bfloat16"}.get(precision, precision))

    def search(self, queries: list[list[int]], batch_size: int, beam: int, eval_len: int,
               length_penalty: float, no_repeat_ngram_size: int, eos: list[int]) -> dict:
        started = time.perf_counter()
        results = self.generator.generate_batch(
            [[str(token) for token in query] for query in queries], max_batch_size=batch_size,
            beam_size=beam, max_length=eval_len, length_penalty=length_penalty,
            no_repeat_ngram_size=no_repeat_ngram_size, end_token=eos, return_end_token=True,
            include_prompt_in_result=False)
        found = [result.sequences_ids[0] for result in results]
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "ids": [ids + [0] * (eval_len - len(ids)) for ids in found]}


if __name__ == "__main__":
    serve(Side())
