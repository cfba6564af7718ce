"""The forward pass that trains the demonstration model, fast on a CPU.

The parameters are those of OlmoeForCausalLM; the pass is written out because the stock one spends most of its time, on
a CPU, outside large products. Products are bfloat16; weights, router, norms and residual float32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import OlmoeForCausalLM
from transformers.models.olmoe.modeling_olmoe import apply_rotary_pos_emb


class GroupedLinear(torch.autograd.Function):
    """x (slots, in) sorted by expert, weight (E, out, in) -> (slots, out); `sizes` are the slots of each expert."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        out = x.new_empty(len(x), weight.shape[1])
        for w, xs, outs in zip(weight, x.split(sizes), out.split(sizes), strict=True):
            torch.mm(xs, w.T, out=outs)
        return out

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        slices = [t.split(ctx.sizes) for t in (x, grad, grad_x)]
        for w, grad_w, xs, grads, grad_xs in zip(weight, grad_weight, *slices, strict=True):
            torch.mm(grads, w, out=grad_xs)
            torch.mm(grads.T, xs, out=grad_w)
        return grad_x, grad_weight, None


class Dispatch(torch.autograd.Function):
    """Copy tokens (T, H) to expert slots (slots, H). `token` (slots,) is T for an empty slot; `slot` is (T, k)."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, token: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        ctx.slot = slot
        return F.pad(x, (0, 0, 0, 1))[token]

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return grad[ctx.slot].sum(1), None, None


class Combine(torch.autograd.Function):
    """The transpose of `Dispatch`: sum over each token's k slots."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, token: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        ctx.token = token
        return x[slot].sum(1)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return F.pad(grad, (0, 0, 0, 1))[ctx.token], None, None


@torch.compile(dynamic=True)
def gated(h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    gate, up = h.float().chunk(2, dim=-1)
    return (F.silu(gate) * up * weight[:, None]).bfloat16()


def run_experts(experts: Any, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """x (T, H), ids (T, k), weights (T, k) -> (T, H)."""
    k, flat = ids.shape[1], ids.flatten()
    counts = flat.bincount(minlength=experts.num_experts)
    # Slots in multiples of 64: oneDNN compiles a kernel a shape, so free sizes would recompile forever.
    sizes = (counts + 63) // 64 * 64
    order = flat.argsort(stable=True)
    gaps = (sizes.cumsum(0) - sizes) - (counts.cumsum(0) - counts)
    destination = torch.arange(len(flat)) + gaps.repeat_interleave(counts)
    slot = torch.empty_like(flat).scatter_(0, order, destination)
    token = torch.full((int(sizes.sum()),), len(x)).scatter_(0, destination, order // k)
    slot_weights = torch.zeros(len(token)).scatter(0, slot, weights.flatten())
    xs = Dispatch.apply(x.bfloat16(), token, slot.view(-1, k))
    h = GroupedLinear.apply(xs, experts.gate_up_proj.bfloat16(), sizes.tolist())
    y = GroupedLinear.apply(gated(h, slot_weights), experts.down_proj.bfloat16(), sizes.tolist())
    return Combine.apply(y, token, slot.view(-1, k)).float()


@torch.compile
def attend(layer: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor):
    """x (B, L, H) -> x after attention, the experts' input (B*L, H), and router probabilities (B*L, E)."""
    attention, (batch, length, _) = layer.self_attn, x.shape
    h = layer.input_layernorm(x).bfloat16()
    q = attention.q_norm(F.linear(h, attention.q_proj.weight.bfloat16()).float())
    k = attention.k_norm(F.linear(h, attention.k_proj.weight.bfloat16()).float())
    v = F.linear(h, attention.v_proj.weight.bfloat16())
    q, k, v = (t.view(batch, length, -1, attention.head_dim).transpose(1, 2) for t in (q, k, v))
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    # Written out: at these sizes it beats the fused CPU kernel. No padding mask: only tails are padded.
    scores = (q.bfloat16() @ k.bfloat16().transpose(2, 3)).float() * attention.scaling + mask
    out = (scores.softmax(-1).bfloat16() @ v).transpose(1, 2).reshape(batch, length, -1)
    x = x + F.linear(out, attention.o_proj.weight.bfloat16()).float()
    h = layer.post_attention_layernorm(x).flatten(0, 1)
    return x, h, F.linear(h, layer.mlp.gate.weight).softmax(-1)


def forward(model: OlmoeForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """ids (B, L) -> hidden states (B*L, H), and a layer: router probabilities (B*L, E), chosen experts (B*L, k)."""
    x = model.model.embed_tokens(ids)
    cos, sin = model.model.rotary_emb(x, torch.arange(ids.shape[1])[None])
    mask = torch.full((ids.shape[1], ids.shape[1]), -torch.inf).triu(1)
    probabilities, chosen = [], []
    layer: Any
    for layer in model.model.layers:
        x, h, p = attend(layer, x, cos, sin, mask)
        weights, experts = p.topk(model.config.num_experts_per_tok, dim=-1)
        x = x + run_experts(layer.mlp.experts, h, experts, weights).view_as(x)
        probabilities.append(p)
        chosen.append(experts)
    return model.model.norm(x).flatten(0, 1), probabilities, chosen


@torch.compile
def softmax_loss(logits: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy a token (unscaled), and the gradient of the scaled sum in the logits."""
    shifted = logits.float() - logits.float().amax(-1, keepdim=True)
    total = shifted.exp().sum(-1, keepdim=True)
    loss = total.log().squeeze(1) - shifted.gather(1, targets[:, None]).squeeze(1)
    hit = torch.arange(logits.shape[1]) == targets[:, None]
    return loss, ((shifted.exp() / total - hit.float()) * scale[:, None]).bfloat16()


class HeadLoss(torch.autograd.Function):
    """Mean loss over tokens with `keep` 1, and losses a token, in chunks: the logits of a batch never exist at once."""

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, keep: torch.Tensor):
        head, scale, losses = weight.bfloat16(), keep / keep.sum(), []
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for h, t, s, grad_h in zip(*(x.split(512) for x in (hidden, targets, scale, grad_hidden)), strict=True):
            h = h.bfloat16()
            loss, grad = softmax_loss(h @ head.T, t, s)
            losses.append(loss)
            if ctx.needs_input_grad[0]:
                grad_h.copy_(grad @ head)
                grad_weight += grad.T @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        losses = torch.cat(losses)
        ctx.mark_non_differentiable(losses)
        return (losses * scale).sum(), losses

    @staticmethod
    def backward(ctx, grad: torch.Tensor, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None, None
