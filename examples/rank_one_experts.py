"""Three ways to see what a Mixture of Decoders is, each checked on random numbers.

    python examples/rank_one_experts.py

1. Its weights are a Khatri-Rao product: the tensor W[n, d, h] = C[n, d] D[d, h] is never formed, and still the layer is
   exactly the mixture y = Σ_n a_n W_n z + b.
2. An expert has the rank of D, whatever K is: no bottleneck. A transcoder's feature has rank 1.
3. An ordinary GLU block is a mixture of decoders too, one of rank-1 experts: as many as hidden units, chosen by its gate.
"""

import torch

from mxdsurgery import MxDLayer

torch.manual_seed(0)
D, H, N, K = 16, 40, 100, 8
layer = MxDLayer(d_model=D, d_hidden=H, n_experts=N, k=K, kind="glu", activation="silu", encoder_bias=False).double()
torch.nn.init.normal_(layer.decoder.weight)
x = torch.randn(5, D, dtype=torch.float64)
a, z = layer.gate(x).dense(N), layer.hidden(x)

# 1. The explicit mixture, with all N matrices, against the layer, which never forms them.
experts = torch.einsum("nd,dh->ndh", layer.experts.weight, layer.decoder.weight)
mixture = torch.einsum("bn,ndh,bh->bd", a, experts, z) + layer.bias
print(f"the mixture of {N} matrices and the layer differ by {(mixture - layer(x)).abs().max():.0e}")
torch.testing.assert_close(mixture, layer(x))

# Unfolded, the tensor is the Khatri-Rao product of C and D, transposed: column d is the Kronecker product of their columns d.
unfolded = experts.permute(0, 2, 1).reshape(N * H, D)
columns = [torch.kron(layer.experts.weight[:, d], layer.decoder.weight[d]) for d in range(D)]
torch.testing.assert_close(unfolded, torch.stack(columns, dim=1))
stored = layer.experts.weight.numel() + layer.decoder.weight.numel()
print(f"{experts.numel():,} numbers in the tensor, {stored:,} stored")

# 2. Rank.
ranks = {int(torch.linalg.matrix_rank(expert)) for expert in experts}
print(f"ranks of the experts: {ranks}; of D: {int(torch.linalg.matrix_rank(layer.decoder.weight))}")
assert ranks == {int(torch.linalg.matrix_rank(layer.decoder.weight))}

# 3. y = W_down (silu(g) * u), with g = E_g x and u = E_u x, is Σ_h silu(g_h) · (w_h e_hᵀ) u: H experts of rank 1, expert h
#    with coefficient silu(g_h) (dense: nothing is chosen) and with matrix w_h e_hᵀ, of column h of W_down and unit vector h.
down = torch.randn(D, H, dtype=torch.float64)
gate, up = layer.encoder(x), layer.encoder_up(x)
glu = (torch.nn.functional.silu(gate) * up) @ down.T
rank_one = torch.einsum("dh,hj->hdj", down, torch.eye(H, dtype=torch.float64))
as_mixture = torch.einsum("bh,hdj,bj->bd", torch.nn.functional.silu(gate), rank_one, up)
print(f"a GLU block and its mixture of {H} rank-1 experts differ by {(glu - as_mixture).abs().max():.0e}")
torch.testing.assert_close(glu, as_mixture)
assert {int(torch.linalg.matrix_rank(expert)) for expert in rank_one} == {1}
