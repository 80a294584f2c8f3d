"""OpenVINO GenAI as a side of bench_beam.py; convert_openvino.py converts the model."""

from __future__ import annotations

import os
import time
from importlib import metadata

import numpy as np
import openvino
import openvino_genai as genai

from serving import serve


class Side:
    def start(self, device: str) -> dict:
        """The versions and the number of threads. Raises ValueError for a GPU."""
        if device != "cpu":
            raise ValueError("this side is for --device cpu")
        self.threads = len(os.sched_getaffinity(0))
        return {"versions": {"openvino-genai": metadata.version("openvino-genai")},
                "threads": self.threads}

    def load(self, folder: str, precision: str) -> None:
        """int8: weights of a byte, products in the precision that OpenVINO prefers."""
        exact = precision == "float32"
        options = {"INFERENCE_NUM_THREADS": self.threads, "ATTENTION_BACKEND": "SDPA",
                   # By default keys and values are in 8 bits, which changes what is found.
                   "KV_CACHE_PRECISION": "f32" if exact else "bf16"}
        if precision != "int8":
            options["INFERENCE_PRECISION_HINT"] = "f32" if exact else "bf16"
        stored = "int8" if precision == "int8" else "float32"
        self.pipeline = genai.LLMPipeline(f"{folder}/{stored}", "CPU", options)

    def search(self, queries: list[list[int]], batch_size: int, beam: int, eval_len: int,
               length_penalty: float, no_repeat_ngram_size: int, eos: list[int]) -> dict:
        config = genai.GenerationConfig()
        config.num_beams, config.max_new_tokens = beam, eval_len
        config.length_penalty, config.no_repeat_ngram_size = length_penalty, no_repeat_ngram_size
        config.eos_token_id, config.stop_token_ids = eos[0], set(eos)
        config.stop_criteria = genai.StopCriteria.NEVER  # a beam ends when none can be better
        config.num_return_sequences, config.apply_chat_template = 1, False
        started = time.perf_counter()
        found = []
        for first in range(0, len(queries), batch_size):
            part = queries[first:first + batch_size]
            ids = np.full((len(part), max(map(len, part))), eos[0], np.int64)
            mask = np.zeros_like(ids)
            for row, kept, query in zip(ids, mask, part):  # padded on the left
                row[-len(query):], kept[-len(query):] = query, 1
            inputs = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(mask))
            found += [[int(token) for token in tokens]
                      for tokens in self.pipeline.generate(inputs, config).tokens]
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "ids": [ids + [0] * (eval_len - len(ids)) for ids in found]}


if __name__ == "__main__":
    serve(Side())
