"""The PyTorch part of the tests, in its own process because PyTorch can conflict with Jittor.

Reads requests from stdin, one JSON object per line: ``{"operation": NAME, "options": {...},
"folder": DIR}``. Calls the function NAME below with the arrays of DIR/in.npz and the options,
writes the arrays it returns to DIR/out.npz and prints ``done``. The models, data and schedules are
those of align/, which uses transformers, loralib and PyTorch.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "align"))

import loralib  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import torch_beam  # noqa: E402
import torch_data  # noqa: E402
import torch_model  # noqa: E402
import torch_optim  # noqa: E402


def permutations(arrays, sizes, seeds):
    return {f"{n} {seed}": torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()
            for n in sizes for seed in seeds}


def batches(arrays, path, batch_size, seq_len, joint_lm, seed, epochs, drop_last):
    """The batches of the given epochs as arrays "I NUMBER input" etc., of epoch ``epochs[I]``."""
    dataset = torch_data.FTDataset(torch_data.read_samples(path), batch_size, seq_len, joint_lm)
    loader = torch_data.make_loader(dataset, seed, drop_last)
    results = {}
    for turn, epoch in enumerate(epochs):
        loader.sampler.set_epoch(epoch)
        for number, batch in enumerate(loader):
            for name in ("input", "target", "mask"):
                results[f"{turn} {number} {name}"] = batch[name].numpy()
    return results


def distributed(arrays, length, batch_size, seed, epoch, rank, world_size, drop_last):
    """The positions of the samples in each batch of an epoch in process ``rank``."""
    sampler = torch.utils.data.DistributedSampler(range(length), world_size, rank, shuffle=True,
                                                  seed=seed)
    sampler.set_epoch(epoch)
    loader = torch.utils.data.DataLoader(range(length), batch_size, sampler=sampler,
                                         drop_last=drop_last)
    return {str(number): batch.numpy() for number, batch in enumerate(loader)}


def _model(arrays, card, r, alpha, dtype="float64"):
    model = torch_model.build(card, lora_dim=r, lora_alpha=alpha)
    parameters = dict(model.named_parameters())
    weights = {name: a for name, a in arrays.items() if name.startswith("transformer.")}
    assert weights.keys() == parameters.keys()
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(torch.from_numpy(weights[name]))
    return model.to(getattr(torch, dtype))


def logits(arrays, **model):
    """``input_ids`` (B, T) -> ``logits`` (B, T, V)."""
    with torch.no_grad():
        ids = torch.from_numpy(arrays["input_ids"]).long()
        return {"logits": _model(arrays, **model)(ids).logits.numpy()}


def loss_and_gradients(arrays, label_smooth, **model):
    """``loss`` and the gradient of every trained parameter by name."""
    model = _model(arrays, **model)
    out = model(torch.from_numpy(arrays["input_ids"]).long()).logits
    loss = torch_model.loss(out, torch.from_numpy(arrays["target"]).long(),
                            torch.from_numpy(arrays["mask"]).to(out.dtype), label_smooth)
    loss.backward()
    return {"loss": loss.detach().numpy(),
            **{n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}}


def lora_state(arrays, **model):
    """loralib's LoRA state dict of a new model."""
    torch.manual_seed(0)
    model = torch_model.build(model["card"], lora_dim=model["r"], lora_alpha=model["alpha"])
    return {name: value.numpy() for name, value in loralib.lora_state_dict(model).items()}


def merged_linear(arrays, enable_lora, r, alpha):
    """loralib's layer: ``y`` and the gradients of sum(y * ``upstream``) of x and all weights."""
    n_in, n_out = arrays["weight"].shape
    layer = loralib.MergedLinear(n_in, n_out, r=r, lora_alpha=alpha, enable_lora=enable_lora,
                                 fan_in_fan_out=True, merge_weights=False).double()
    with torch.no_grad():
        for name, p in layer.named_parameters():
            p.copy_(torch.from_numpy(arrays[name]))
            p.requires_grad_()
    x = torch.from_numpy(arrays["x"]).double().requires_grad_()
    y = layer(x)
    (y * torch.from_numpy(arrays["upstream"])).sum().backward()
    return {"y": y.detach().numpy(), "x": x.grad.numpy(),
            **{name: p.grad.numpy() for name, p in layer.named_parameters()}}


def adamw(arrays, rates, no_decay_bias, **options):
    """``weight`` and ``bias`` after each update i with ``grad_weight[i]`` and ``grad_bias[i]``."""
    module = torch.nn.Module()
    for name in ("weight", "bias"):
        setattr(module, name, torch.nn.Parameter(torch.from_numpy(arrays[name]).double()))
    optimizer = torch_optim.AdamW(torch_optim.parameter_groups(module, no_decay_bias), lr=0.0,
                                  **options)
    trace = {"weight": [], "bias": []}
    for step, rate in enumerate(rates):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for name in trace:
            getattr(module, name).grad = torch.from_numpy(arrays[f"grad_{name}"][step]).double()
        optimizer.step()
        for name, values in trace.items():
            values.append(getattr(module, name).detach().numpy().copy())
    return trace


def clip(arrays, max_norm):
    parameters = {name: torch.nn.Parameter(torch.zeros(a.shape)) for name, a in arrays.items()}
    for name, p in parameters.items():
        p.grad = torch.from_numpy(arrays[name])
    torch.nn.utils.clip_grad_norm_(parameters.values(), max_norm)
    return {name: p.grad.numpy() for name, p in parameters.items()}


def schedule(arrays, steps, **options):
    """``rates``: the learning rate after 0, 1, ... micro-batches."""
    rule, rates = torch_optim.make_schedule(**options), []
    for _ in range(steps):
        rates.append(rule.lr)
        rule.step()
    return {"rates": rates}


def transformers_schedule(arrays, name, lr, warmup_step, max_step, steps):
    """The same from transformers' schedules, which are torch's LambdaLR."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=lr)
    if name == "linear":
        rule = transformers.get_linear_schedule_with_warmup(optimizer, warmup_step, max_step)
    else:
        rule = transformers.get_constant_schedule_with_warmup(optimizer, warmup_step)
    assert isinstance(rule, torch.optim.lr_scheduler.LambdaLR)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        rule.step()
    return {"rates": rates}


def beam_search(arrays, model, queries, options):
    """Result ``i`` has the continuation of each query with the i-th options, padded with -1."""
    model, results = _model(arrays, **model), {}
    for number, settings in enumerate(options):
        found = [torch_beam.search(model, query, **settings) for query in queries]
        length = settings["eval_len"]
        results[str(number)] = [ids + [-1] * (length - len(ids)) for ids in found]
    return results


def warp(arrays, temperature, top_k, top_p):
    """``scores`` after transformers' temperature, top-k and top-p."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = torch.from_numpy(arrays["scores"])  # (R, V)
    warpers = [TemperatureLogitsWarper(temperature), TopPLogitsWarper(top_p)]
    if top_k:  # transformers has no warper for all tokens
        warpers.insert(1, TopKLogitsWarper(top_k))
    for warper in warpers:
        scores = warper(None, scores)
    return {"scores": scores.numpy()}


def _odd_tensors():
    """Tensors of every kind that a checkpoint may hold."""
    torch.manual_seed(0)
    base = torch.randn(6, 4)
    expanded = torch.randn(1, 3).expand(2, 3)
    return {"float32": torch.randn(2, 3), "float64": torch.randn(3).double(),
            "float16": torch.randn(5).half(), "bfloat16": torch.randn(2, 2, 2).bfloat16(),
            "int64": torch.tensor([-2**40, 7]), "int32": torch.tensor([-3], dtype=torch.int32),
            "bool": torch.tensor([True, False]), "uint8": torch.tensor([255], dtype=torch.uint8),
            "transposed": torch.randn(3, 5).t(), "permuted": torch.randn(2, 3, 4).permute(2, 0, 1),
            "shared": base, "row": base[2], "column": base[:, 1], "every other": base[1::2, ::2],
            "expanded": expanded, "scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3),
            "parameter": torch.nn.Parameter(torch.randn(2)), "ends": base[5:, 3:]}


def save_odd_tensors(arrays, path, zipped):
    tensors = _odd_tensors()
    torch.save({"tensors": tensors, "step": 3, "note": "a text", "list": [1, (2.5, None)],
                "fresh": True}, path, _use_new_zipfile_serialization=zipped)
    return {name: (t.float() if t.dtype == torch.bfloat16 else t).detach().numpy()
            for name, t in tensors.items()}


def save_run(arrays, path, zipped):
    """What training programs store beside the weights; ``names`` of what is neither list nor dict
    of numbers and tensors."""
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    weight.grad.zero_()
    optimizer.step()
    weight.data.copy_(torch.tensor([1.0, 2.0]))
    beside = {"dtype": torch.float32, "size": weight.size(), "device": torch.device("cuda:1"),
              "best": np.float64(0.5), "args": argparse.Namespace(lr=0.1, out=Path("out")),
              "seen": {1, 2}, "version": torch.__version__, "type": np.float32,
              "at": datetime.datetime(2025, 1, 1)}
    torch.save({"state_dict": {"weight": weight}, "optimizer": optimizer.state_dict(),
                "losses": [0.5] * 1000, "groups": collections.defaultdict(dict), **beside}, path,
               _use_new_zipfile_serialization=zipped)
    return {"names": np.array(list(beside))}


def save(arrays, path, dtype="float32", zipped=True, wrapped=False):
    """torch.save of the arrays as a state dict; matrices are in column-major order."""
    state = {name: torch.from_numpy(np.asfortranarray(a)).to(getattr(torch, dtype))
             for name, a in arrays.items()}
    torch.save({"model_state_dict": state, "step": 7} if wrapped else state, path,
               _use_new_zipfile_serialization=zipped)
    return {}


def load(arrays, path):
    """What torch.load reads from a file with weights_only; "/" joins the names of nested dicts."""
    def flat(value, name):
        if isinstance(value, dict):
            return {k: v for key, item in value.items()
                    for k, v in flat(item, f"{name}/{key}" if name else key).items()}
        return {name: value.numpy() if torch.is_tensor(value) else np.array(value)}

    return flat(torch.load(path, weights_only=True), "")


def save_safetensors(arrays, path, dtype="float32"):
    from safetensors.torch import save_file

    save_file({name: torch.from_numpy(a).to(getattr(torch, dtype)) for name, a in arrays.items()},
              path)
    return {}


def save_pretrained(arrays, path, dims, **options):
    """Writes transformers' folder of a random GPT-2; ``logits`` (B, T, V) of ``input_ids``."""
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        **dims, initializer_range=0.25, bos_token_id=0, eos_token_id=0)).eval()
    for p in model.parameters():  # none keeps an initial value of 0 or 1
        p.data += torch.randn_like(p) * 0.1
    model.save_pretrained(path, **options)
    with torch.no_grad():
        ids = torch.from_numpy(arrays["input_ids"]).long()
        return {"logits": model.double()(ids).logits.numpy()}


def load_into_model(arrays, path, card, r):
    model = torch_model.build(card, lora_dim=r)
    torch_model.load_weights(model, path)
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


def folder_logits(arrays, base, adapter=None):
    """transformers' ``logits`` (B, T, V) of a folder, with PEFT's adapter in it; in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base).double()
    if adapter:
        import peft
        model = peft.PeftModel.from_pretrained(model, adapter).double()
    with torch.no_grad():
        return {"logits": model.eval()(torch.from_numpy(arrays["ids"]).long()).logits.numpy()}


def save_adapter(arrays, base, path, scale=0.1, **config):
    """Saves an adapter of PEFT with random matrices; returns its ``logits`` as above."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base),
                                peft.LoraConfig(task_type="CAUSAL_LM", **config))
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += scale * torch.randn_like(p)
    model.save_pretrained(path)
    with torch.no_grad():
        ids = torch.from_numpy(arrays["ids"]).long()
        return {"logits": model.double().eval()(ids).logits.numpy()}


def tokenize(arrays, folder, texts):
    """The ids of each text by transformers' tokenizers and by ``tokenizers`` itself."""
    import tokenizers
    from transformers import AutoTokenizer

    ways = {"slow": AutoTokenizer.from_pretrained(folder, use_fast=False).encode,
            "fast": AutoTokenizer.from_pretrained(folder).encode,
            "alone": lambda text: tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
            .encode(text).ids}
    return {f"{way} {n}": np.array(encode(text), int) for way, encode in ways.items()
            for n, text in enumerate(texts)}


OPERATIONS = {function.__name__: function for function in (
    permutations, batches, distributed, logits, loss_and_gradients, lora_state, merged_linear,
    adamw, clip, schedule, transformers_schedule, beam_search, warp, save_odd_tensors, save_run,
    save, save_safetensors, save_pretrained, load, load_into_model, folder_logits, save_adapter,
    tokenize)}


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        folder = Path(request["folder"])
        with np.load(folder / "in.npz") as arrays:
            results = OPERATIONS[request["operation"]](dict(arrays), **request["options"])
        np.savez(folder / "out.npz", **results)
        print("done", flush=True)


if __name__ == "__main__":
    main()
