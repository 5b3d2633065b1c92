"""Rotation of a Llama-like model by random Hadamard matrices (QuaRot, arXiv 2404.00456, without its online ones): tried, and measured here."""
from __future__ import annotations

import torch
from torch import Tensor, nn

from gptvq.errors import ConfigError
from gptvq.hessian import Hessian

from .layers import Layer

_PALEY = 11                     # a prime that is 3 modulo 4 gives a Hadamard matrix of one more


def hadamard(n: int) -> Tensor:
    """[n, n] of +-1 with H H^T = n I, float64, by Kronecker products of order 2 and 12; ConfigError where they do not make n."""
    H, left = torch.ones(1, 1, dtype=torch.float64), n
    while left % 3 == 0 and left % 12 == 0:
        H, left = torch.kron(H, paley(_PALEY)), left // 12
    while left % 2 == 0:
        H, left = torch.kron(H, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)), left // 2
    if left != 1:
        raise ConfigError(f"rotation: got a width of {n}, need products of 2 and 12")
    return H


def paley(q: int) -> Tensor:
    """[q + 1, q + 1] of +-1 for a prime q = 3 modulo 4: I + S, S skew with the quadratic residues modulo q."""
    residues = {i * i % q for i in range(1, q)}
    S = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    S[0, 1:], S[1:, 0] = 1, -1
    S[1:, 1:] = torch.tensor([[0.0 if i == j else 1.0 if (i - j) % q in residues else -1.0 for j in range(q)] for i in range(q)])
    return S + torch.eye(q + 1, dtype=torch.float64)


def random_hadamard(n: int, generator: torch.Generator) -> Tensor:
    """[n, n] orthogonal, float64: a Hadamard matrix whose rows have random signs."""
    signs = torch.randint(0, 2, (n, 1), generator=generator).double() * 2 - 1
    return signs * hadamard(n) / n ** 0.5


@torch.no_grad()
def rotate(model: nn.Module, residual: bool = True, seed: int = 0) -> nn.Module:
    """Changes the weights of a Llama-like `model` in place to those of an equal one with other values inside.

    The values of every head are rotated between v_proj and o_proj; with `residual` the residual stream as well, for which the norms' weights
    go into the linears behind them, and the head, which is no longer the embedding, becomes a matrix of its own.
    """
    generator, dtype = torch.Generator().manual_seed(seed), model.lm_head.weight.dtype
    width, decoder = model.config.hidden_size, model.model
    per_head = getattr(model.config, "head_dim", None) or width // model.config.num_attention_heads
    R = random_hadamard(width, generator) if residual else torch.eye(width, dtype=torch.float64)
    V = random_hadamard(per_head, generator)

    def put(module: nn.Module, weight: Tensor) -> None:
        module.weight = nn.Parameter(weight.to(dtype))

    def take(norm: nn.Module) -> Tensor:
        weight = norm.weight.double() if residual else torch.ones(width, dtype=torch.float64)
        if residual:
            norm.weight.fill_(1)
        return weight

    if residual:
        model.config.tie_word_embeddings = False
        put(model.lm_head, (model.lm_head.weight.double() * take(decoder.norm)) @ R)
        put(decoder.embed_tokens, decoder.embed_tokens.weight.double() @ R)
    for block in decoder.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm, readers in ((block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                              (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj))):
            scale = take(norm)
            for linear in readers:
                put(linear, (linear.weight.double() * scale) @ R)
        for linear in (attention.o_proj, mlp.down_proj):
            put(linear, R.T @ linear.weight.double())
        v = attention.v_proj.weight.double().view(-1, per_head, width)
        put(attention.v_proj, (V.T @ v).reshape(-1, width))
        put(attention.o_proj, (attention.o_proj.weight.double().view(width, -1, per_head) @ V).reshape(width, -1))
    return model


def blocks(cols: int, generator: torch.Generator) -> Tensor:
    """[cols, cols] orthogonal, float64: random Hadamard matrices, as wide as the greatest power of two that divides cols."""
    width = cols & -cols
    return torch.block_diag(*(random_hadamard(width, generator) for _ in range(cols // width)))


class Turn(nn.Module):
    """x [.., cols] -> x B, by a dense product: what it takes is not measured."""

    def __init__(self, B: Tensor):
        super().__init__()
        self.register_buffer("B", B)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.B


@torch.no_grad()
def turn(model: nn.Module, seed: int = 0) -> nn.Module:
    """Puts into a Llama-like `model` a rotation of the inputs of every down_proj, at inference, and its inverse into the weight behind it."""
    generator = torch.Generator().manual_seed(seed)
    for block in model.model.layers:
        linear = block.mlp.down_proj
        B = blocks(linear.in_features, generator)
        linear.weight = nn.Parameter((linear.weight.double() @ B).to(linear.weight.dtype))
        block.mlp.down_proj = nn.Sequential(Turn(B.to(linear.weight.dtype)), linear)
    return model


def turned(found: list[Layer], seed: int) -> list[Layer]:
    """The layers, but for every down_proj what `turn` makes of it."""
    generator, made = torch.Generator().manual_seed(seed), []
    for layer in found:
        if layer.name.endswith("down_proj"):
            B = blocks(layer.weight.shape[1], generator)
            hessians = {side: Hessian.from_matrix((B.T @ hessian.matrix().double() @ B).float()) for side, hessian in layer.hessians.items()}
            layer = Layer(layer.name, (layer.weight.double() @ B).float(), hessians)
        made.append(layer)
    return made
