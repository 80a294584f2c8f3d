"""transformers as a side of the benchmarks: peft for training, ``generate`` for beam search.

The settings are for speed: PyTorch's fused attention, and batches padded to their longest sample.
Padding on the right needs no attention mask, which would make fused attention slower. LoRA is
peft's, on the whole of c_attn; the loss is transformers' own (no label smoothing). bf16 is
PyTorch's autocast.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import peft
import torch
import transformers

from serving import serve
from torch_side import TorchSide, batches, merged


class Side(TorchSide):
    packages = ("torch", "transformers", "peft")

    def load(self, card: str, base: str, lora: str | None, r: int, alpha: int,
             lora_dropout: float = 0.0, precision: str = "float32") -> None:
        """Merges LoRA into the base; without ``lora``, the file ``base`` has both."""
        self.autocast = precision == "bf16"
        self.optimizer = None
        self.model = merged(card, base, lora, r, alpha).to(self.device).eval()
        self.lora = peft.LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=alpha,
                                    lora_dropout=lora_dropout, target_modules=["c_attn"],
                                    fan_in_fan_out=True)

    def start_training(self, data: str, *, batch_size: int, seq_len: int, grad_acc: int,
                       label_smooth: float, lr: float, warmup_step: int, max_step: int,
                       weight_decay: float, beta2: float, seed: int) -> None:
        self.batches = batches(data, batch_size, seq_len, seed)
        self.model = peft.get_peft_model(self.model, self.lora).train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr, (0.9, beta2), 1e-6, weight_decay)
        self.schedule = transformers.get_linear_schedule_with_warmup(
            self.optimizer, warmup_step // grad_acc, max_step // grad_acc)
        self.grad_acc, self.step = grad_acc, 0

    def micro_batch(self) -> float:
        batch = next(self.batches)
        mask = batch["mask"].bool()  # (B, T): positions whose target counts
        width = int(mask.any(dim=0).nonzero().max()) + 2  # includes the last target
        input_ids = batch["input"][:, :width].to(self.device)
        # transformers shifts the labels itself: a label has the position of its own token.
        labels = torch.full_like(batch["input"], -100)
        labels[:, 1:] = batch["target"].where(mask, -100)[:, :-1]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            loss = self.model(input_ids=input_ids, labels=labels[:, :width].to(self.device),
                              use_cache=False).loss
        (loss / self.grad_acc).backward()
        self.step += 1
        if self.step % self.grad_acc == 0:
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
        return loss.item()

    @torch.no_grad()
    def search(self, queries: list[list[int]], batch_size: int, beam: int, eval_len: int,
               length_penalty: float, no_repeat_ngram_size: int, eos: list[int]) -> dict:
        """Searches one query at a time."""
        started = time.perf_counter()
        found = []
        for query in queries:
            input_ids = torch.tensor([query], device=self.device)
            output = self.model.generate(
                input_ids, attention_mask=torch.ones_like(input_ids), num_beams=beam,
                do_sample=False, max_new_tokens=eval_len, length_penalty=length_penalty,
                no_repeat_ngram_size=no_repeat_ngram_size, eos_token_id=eos, pad_token_id=0)
            found.append(output[0, len(query):].tolist())
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "ids": [ids + [0] * (eval_len - len(ids)) for ids in found]}

    def convert(self, folder: str, **model) -> None:
        """Writes the model to ``folder`` in CTranslate2's format, in float32, LoRA merged.

        The text of each token is its id, because side_ctranslate2.py passes and returns ids.
        """
        import tokenizers
        from ctranslate2.converters import TransformersConverter

        whole = merged(**model)
        size = whole.config.vocab_size
        words = tokenizers.Tokenizer(tokenizers.models.WordLevel(
            {str(token): token for token in range(size)}, unk_token=str(size - 1)))
        end = str(size - 1)  # <|endoftext|>, which GPT-2 uses for all three
        with tempfile.TemporaryDirectory(dir=Path(folder).parent) as published:
            whole.save_pretrained(published)
            transformers.PreTrainedTokenizerFast(
                tokenizer_object=words, bos_token=end, eos_token=end,
                unk_token=end).save_pretrained(published)
            TransformersConverter(published).convert(folder)


if __name__ == "__main__":
    serve(Side())
