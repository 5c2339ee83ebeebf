"""What the slow network writes to and reads from. Each memory has two methods:

    answer(q [B,K], k [B,L,K], v [B,L,S], beta [B,L] or None)     one question per sequence, after all writes
        returns o [B,S] and the pullback from do to dq, dk, dbeta
    recall(q [Q,K], k, v, beta)                                   many questions, without gradients
        returns o [B,Q,S]

:class:`FastWeight` is this library's linear attention and delta rule with their options, gradients included.
:class:`OneQuestion` is a cheaper way to train the sum rule. The others are what the paper compares with:
softmax attention, and the rule of the Fast Weight Memory.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

import fwp_core as fwp


@dataclass(frozen=True)
class FastWeight:
    """A fast weight programmed by a rule of fwp_core."""

    scan: Callable
    feature_map: fwp.feature_maps.FeatureMap | None = None
    qk_norm: str | None = None
    attention_norm: bool = False
    eps: float = 1e-6

    @property
    def options(self):
        names = ("feature_map", "qk_norm", "attention_norm", "eps")
        return {name: getattr(self, name) for name in names}

    def answer(self, q, k, v, beta):
        queries = np.zeros_like(k)
        queries[:, -1] = q  # the read comes after the write of the same token
        (o, _), pullback = fwp.vjp(self.scan, *with_head(queries, k, v, beta), **self.options)

        def answer_pullback(do):
            every_do = np.zeros_like(o)
            every_do[:, -1, 0] = do
            gradients = pullback(every_do)
            dbeta = None if beta is None else gradients.dbeta[..., 0]
            return gradients.dq[:, -1, 0], gradients.dk[:, :, 0], dbeta

        return o[:, -1, 0], answer_pullback

    def recall(self, q, k, v, beta):
        _, state = self.scan(*with_head(np.zeros_like(k), k, v, beta), **self.options)
        q = q if self.feature_map is None else self.feature_map(q)
        if self.qk_norm is not None:
            q = normalised(q, self.qk_norm)
        read = q @ state[:, 0]
        if self.attention_norm:
            o, total = read[..., :-1], read[..., -1:]
            read = np.divide(o, total + self.eps, where=total != 0, out=np.zeros_like(o))
        return read


@dataclass(frozen=True)
class OneQuestion(FastWeight):
    """The sum rule with attention normalisation, where `answer` compares its one question with all keys.

        w_t = phi(k_t).phi(q) / (sum_s phi(k_s).phi(q) + eps)          o = sum_t w_t v_t

    That is the attention form. For one question it is S times cheaper than a fast weight that could answer
    all, and gives the same numbers to rounding; the feature maps and their gradients are the library's.
    """

    def answer(self, q, k, v, beta):
        phi_q, phi_k = self.feature_map(q)[:, None], self.feature_map(k)
        scores = np.sum(phi_k * phi_q, axis=-1)
        share = 1 / (scores.sum(axis=-1, keepdims=True) + self.eps)
        weights = scores * share

        def pullback(do):
            dweights = matrix_vector(v, do)
            dscores = share * (dweights - np.sum(weights * dweights, axis=-1, keepdims=True))
            dphi_q = np.sum(dscores[:, :, None] * phi_k, axis=1)
            dphi_k = dscores[:, :, None] * phi_q
            return self.feature_map.backward(dphi_q, q), self.feature_map.backward(dphi_k, k), None

        return vector_matrix(weights, v), pullback


def with_head(q, k, v, beta):
    """One head: [B,L,n] to [B,L,1,n]."""
    return q[:, :, None], k[:, :, None], v[:, :, None], None if beta is None else beta[:, :, None]


def normalised(x, qk_norm):
    """x over its sum or length; 0 where that is 0."""
    size = x.sum(-1, keepdims=True) if qk_norm == "sum" else np.linalg.norm(x, axis=-1, keepdims=True)
    return np.divide(x, size, where=size != 0, out=np.zeros_like(x))


class SoftmaxAttention:
    """softmax(K q / sqrt(d)) V."""

    def answer(self, q, k, v, beta):
        weights = self.weights(q[:, None], k)[:, 0]
        scale = k.shape[-1] ** -0.5

        def pullback(do):
            dweights = matrix_vector(v, do)
            dscores = scale * weights * (dweights - np.sum(weights * dweights, axis=-1, keepdims=True))
            return vector_matrix(dscores, k), dscores[:, :, None] * q[:, None], None

        return vector_matrix(weights, v), pullback

    def recall(self, q, k, v, beta):
        return self.weights(q, k) @ v

    def weights(self, q, k):
        scores = k.shape[-1] ** -0.5 * (q @ k.swapaxes(1, 2))
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return weights / weights.sum(axis=-1, keepdims=True)


@dataclass(frozen=True)
class FastWeightMemory:
    """fwp.reference.fwm_rule in the dtype of its inputs, with gradients: tanh, or a map of fwp_core.

        P = W + k (beta e)^T,  e = v - W^T k,  W' = P / c,  c = max(1, |P|_F)         o = layer_norm(W'^T q)

    Backward, with D the gradient with respect to W':

        dP = (D - W' <W', D>) / c where c > 1, else D
        du = dP^T k,  dk = dP u - W de,  dbeta = du.e,  de = beta du,  D = dP - k de^T
    """

    feature_map: fwp.feature_maps.FeatureMap | None = None
    eps: float = 1e-5
    segment: int = 32  # tokens whose states are kept at once; those before are computed again

    def answer(self, q, k, v, beta):
        q, q_pullback = self.features(q)
        k, k_pullback = self.features(k)
        starts = range(0, k.shape[1], self.segment)
        states = [np.zeros((len(k), k.shape[-1], v.shape[-1]), k.dtype)]
        for start in starts:
            states.append(self.write(states[-1], k, v, beta, start)[-1][0])
        o, read_pullback = layer_norm(vector_matrix(q, states[-1]), self.eps)

        def pullback(do):
            dread = read_pullback(do)
            dq = matrix_vector(states[-1], dread)
            adjoint = q[:, :, None] * dread[:, None, :]
            dk, dbeta = np.empty_like(k), np.empty_like(beta)
            for start, state in zip(reversed(starts), reversed(states[:-1]), strict=True):
                steps = self.write(state, k, v, beta, start)
                adjoint = self.write_backward(adjoint, steps, k, beta, start, dk, dbeta)
            return q_pullback(dq), k_pullback(dk), dbeta

        return o, pullback

    def recall(self, q, k, v, beta):
        q, k = self.features(q)[0], self.features(k)[0]
        state = np.zeros((len(k), k.shape[-1], v.shape[-1]), k.dtype)
        for start in range(0, k.shape[1], self.segment):
            state = self.write(state, k, v, beta, start)[-1][0]
        return layer_norm(q @ state, self.eps)[0]

    def write(self, state, k, v, beta, start):
        """(W', c, e) of the tokens of a segment, behind the W that it starts with."""
        steps = [(state, None, None)]
        for t in range(start, min(start + self.segment, k.shape[1])):
            error = v[:, t] - vector_matrix(k[:, t], state)
            state = state + k[:, t, :, None] * (beta[:, t, None] * error)[:, None, :]
            size = np.sqrt(np.sum(state**2, axis=(1, 2)))
            clamp = np.maximum(size, 1)[:, None, None]
            state = state / clamp
            steps.append((state, clamp, error))
        return steps

    def write_backward(self, adjoint, steps, k, beta, start, dk, dbeta):
        for i in reversed(range(1, len(steps))):
            t, before, (state, clamp, error) = start + i - 1, steps[i - 1][0], steps[i]
            along = np.sum(adjoint * state, axis=(1, 2), keepdims=True)
            adjoint = np.where(clamp > 1, (adjoint - along * state) / clamp, adjoint)
            du = vector_matrix(k[:, t], adjoint)
            de = beta[:, t, None] * du
            dk[:, t] = matrix_vector(adjoint, beta[:, t, None] * error) - matrix_vector(before, de)
            dbeta[:, t] = np.sum(du * error, axis=-1)
            adjoint = adjoint - k[:, t, :, None] * de[:, None, :]
        return adjoint

    def features(self, x):
        if self.feature_map is None:
            y = np.tanh(x)
            return y, lambda dy: dy * (1 - y**2)
        return self.feature_map(x), lambda dy: self.feature_map.backward(dy, x)


def vector_matrix(x, matrix):
    """[B,K], [B,K,V] -> [B,V]"""
    return (x[:, None, :] @ matrix)[:, 0]


def matrix_vector(matrix, x):
    """[B,K,V], [B,V] -> [B,K]"""
    return (matrix @ x[:, :, None])[..., 0]


def layer_norm(x, eps):
    """(x - mean) / sqrt(variance + eps) over the last axis, and its pullback."""
    centred = x - x.mean(axis=-1, keepdims=True)
    size = np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + eps)
    y = centred / size

    def pullback(dy):
        return (dy - dy.mean(axis=-1, keepdims=True) - y * np.mean(dy * y, axis=-1, keepdims=True)) / size

    return y, pullback
