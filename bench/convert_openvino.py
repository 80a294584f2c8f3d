"""Converts GPT-2 to the form that OpenVINO GenAI reads, for side_openvino.py.

The model keeps the keys and values itself, as its state; ``beam_idx`` says which row each row
continues. Source of this form: OpenVINO's documentation, Stateful Models.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import openvino
import torch
import torch.nn.functional as F
from openvino import opset13
from openvino._offline_transformations import apply_make_stateful_transformation
from torch import nn

from serving import serve
from torch_side import merged

INPUTS = ("input_ids", "attention_mask", "position_ids", "beam_idx")


class Side:
    @torch.no_grad()
    def convert(self, folder: str, **model) -> None:
        """Writes the model to FOLDER/float32 and FOLDER/int8, LoRA merged."""
        whole = merged(**model)
        sizes = {name: getattr(whole.config, name) for name in ("vocab_size", "n_layer", "n_head")}
        width = whole.config.n_embd // whole.config.n_head
        # A tensor each: the trace would take equal ones for one input.
        past = [torch.zeros(2, whole.config.n_head, 4, width)
                for _ in range(2 * whole.config.n_layer)]
        example = (torch.tensor([[5, 6, 7], [8, 9, 10]]), torch.ones(2, 7, dtype=torch.long),
                   torch.arange(4, 7).expand(2, 3), torch.tensor([0, 1]), *past)
        for name, kind in (("float32", Linear), ("int8", QuantizedLinear)):
            net = openvino.convert_model(Step(whole, kind), example_input=example)
            keep_state(net, whole.config.n_head, width)
            place = Path(folder, name)
            place.mkdir(parents=True)
            openvino.save_model(net, place / "openvino_model.xml", compress_to_fp16=False)
            (place / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))


def keep_state(net: openvino.Model, heads: int, width: int) -> None:
    """Names inputs and outputs, makes their sizes free, and turns keys and values into state."""
    layers = len(net.inputs) - len(INPUTS)  # twice the number of layers
    names = [*INPUTS, *(f"past.{n}" for n in range(layers))]
    for port, name in zip(net.inputs, names):
        port.get_tensor().set_names({name})
        node, rank = port.get_node(), port.get_partial_shape().rank.get_length()
        if name.startswith("past"):
            node.set_partial_shape(openvino.PartialShape([-1, heads, -1, width]))
        else:
            node.set_partial_shape(openvino.PartialShape([-1] * rank))
            node.set_element_type(openvino.Type.i32 if name == "beam_idx" else openvino.Type.i64)
    outputs = ["logits", *(f"present.{n}" for n in range(layers))]
    for port, name in zip(net.outputs, outputs):
        port.get_tensor().set_names({name})
    net.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(net, dict(zip(names[len(INPUTS):], outputs[1:])))
    rows = opset13.gather(opset13.shape_of(net.input("input_ids"), output_type="i64"),
                          opset13.constant([0]), opset13.constant(0))
    empty = opset13.concat([rows, opset13.constant(np.array([heads, 0, width]))], 0)
    for node in net.get_ops():
        if node.get_type_name() == "ReadValue":  # what it reads before the first step
            zero = opset13.constant(0.0, dtype=np.float32)
            node.set_arguments([opset13.broadcast(zero, empty)])
    net.validate_nodes_and_infer_types()


class Linear(nn.Module):
    """y = x W^T + b; weight (N, K)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__()
        self.weight, self.bias = weight.contiguous(), bias

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class QuantizedLinear(Linear):
    """The same with a weight of int8 and a symmetric scale a row, which OpenVINO recognises."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        super().__init__(weight, bias)
        self.scale = self.weight.abs().amax(1, keepdim=True) / 127  # (N, 1)
        self.weight = torch.round(self.weight / self.scale).to(torch.int8)

    def forward(self, x):
        return F.linear(x, self.weight.to(torch.float32) * self.scale, self.bias)


class Step(nn.Module):
    """GPT-2 with keys and values as inputs and outputs, whose rows ``beam_idx`` chooses."""

    def __init__(self, model, kind: type[Linear]):
        super().__init__()
        self.transformer, self.heads = model.transformer, model.config.n_head
        self.layers = nn.ModuleList([nn.ModuleList([
            kind(conv.weight.data.T, conv.bias.data) for conv in (
                block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj)])
            for block in model.transformer.h])
        self.head = kind(model.transformer.wte.weight.data, None)

    def forward(self, input_ids, attention_mask, position_ids, beam_idx, *past):
        """input_ids, position_ids (B, T), attention_mask (B, P), beam_idx (B,), past: keys and
        values of each layer (B, H, P - T, D). Returns logits (B, T, V), keys and values."""
        net, (count, new), total = self.transformer, input_ids.shape, attention_mask.shape[1]
        causal = torch.arange(total) <= torch.arange(total - new, total)[:, None]  # (T, P)
        mask = causal & attention_mask[:, None, None].bool()  # (B, 1, T, P)
        x, present = net.wte.weight[input_ids] + net.wpe.weight[position_ids], []
        for number, (block, (qkv, proj, fc, out)) in enumerate(zip(net.h, self.layers)):
            mixed = qkv(block.ln_1(x)).view(count, new, 3, self.heads, -1)
            query, key, value = (part.squeeze(2).transpose(1, 2) for part in mixed.split(1, 2))
            key, value = (torch.cat([old.index_select(0, beam_idx), part], 2) for old, part in zip(
                past[2 * number:2 * number + 2], (key, value)))
            present += [key, value]
            mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
            x = x + proj(mixed.transpose(1, 2).reshape(count, new, -1))
            x = x + out(F.gelu(fc(block.ln_2(x)), approximate="tanh"))
        return self.head(net.ln_f(x)), *present


if __name__ == "__main__":
    serve(Side())
