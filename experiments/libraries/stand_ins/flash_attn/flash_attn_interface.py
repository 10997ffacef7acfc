"""One block of attention and its gradient, from dense probabilities.

Shapes as flash-attn has them: q [b s a d], k and v [b t k d] with a multiple of k, log-sum-exp [b a s] in fp32; of
packed sequences [tokens a d] and [a tokens]. Causal masks are aligned to the last key.
"""

import torch
from torch import Tensor


def _flash_attn_forward(
    q,
    k,
    v,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    return_softmax=False,
):
    scores = _scores(q, k, softmax_scale, causal)
    lse = scores.logsumexp(-1)
    out = torch.einsum("bast,btad->bsad", (scores - lse[..., None]).exp(), _repeated(v, q))
    return out.to(q.dtype), lse, None, None


def _flash_attn_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    rng_state=None,
):
    probabilities = (_scores(q, k, softmax_scale, causal) - softmax_lse[..., None]).exp()
    dout, delta = dout.float(), (dout.float() * out.float()).sum(-1).transpose(1, 2)
    inner = torch.einsum("bsad,btad->bast", dout, _repeated(v, q)) - delta[..., None]
    dscores = probabilities * inner * softmax_scale
    dq.copy_(torch.einsum("bast,btad->bsad", dscores, _repeated(k, q)))
    dk.copy_(_summed(torch.einsum("bast,bsad->btad", dscores, q.float()), k))
    dv.copy_(_summed(torch.einsum("bast,bsad->btad", probabilities, dout), v))
    return delta


def _flash_attn_varlen_forward(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    return_softmax=False,
):
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], q.shape[0])
    for of_q, of_k in _sequences(cu_seqlens_q, cu_seqlens_k):
        block = _flash_attn_forward(q[None, of_q], k[None, of_k], v[None, of_k], dropout_p, softmax_scale, causal)
        out[of_q], lse[:, of_q] = block[0][0], block[1][0]
    return out, lse, None, None


def _flash_attn_varlen_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    rng_state=None,
):
    for of_q, of_k in _sequences(cu_seqlens_q, cu_seqlens_k):
        of_queries = (dout[None, of_q], q[None, of_q], k[None, of_k], v[None, of_k], out[None, of_q])
        gradients = (dq[None, of_q], dk[None, of_k], dv[None, of_k])
        _flash_attn_backward(*of_queries, softmax_lse[None, :, of_q], *gradients, dropout_p, softmax_scale, causal)


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    scores = torch.einsum("bsad,btad->bast", q.float(), _repeated(k, q)) * scale
    queries, keys = scores.shape[-2:]
    hidden = torch.ones(queries, keys, dtype=torch.bool).triu(1 + keys - queries)
    return scores.masked_fill(hidden, -torch.inf) if causal else scores


def _repeated(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values in fp32, as many heads as queries."""
    return x.float().repeat_interleave(q.shape[2] // x.shape[2], 2)


def _summed(gradient: Tensor, like: Tensor) -> Tensor:
    """A gradient of as many heads as queries, summed to those of keys."""
    return gradient.unflatten(2, (like.shape[2], -1)).sum(3)


def _sequences(cu_q: Tensor, cu_k: Tensor):
    ends_q, ends_k = cu_q.tolist(), cu_k.tolist()
    for i in range(len(ends_q) - 1):
        yield slice(ends_q[i], ends_q[i + 1]), slice(ends_k[i], ends_k[i + 1])
