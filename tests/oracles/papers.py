"""The papers' matrix optimizers in numpy float64, one literal function each.

Every function takes the gradients of one m x n matrix, one per step, and returns the directions U,
one per step; the parameter moves by `-lr * U`. Weight decay and learning rates are left out. A
step that only fills the state has the direction zero. M is the first moment, V the elementwise
second moment, L and R the factors, Q eigenbases, P the gradient in the eigenbasis.
"""

import numpy as np

Matrices = list[np.ndarray]


def soap(
    grads: Matrices, b1: float = 0.95, b2: float = 0.95, every: int = 10, eps: float = 1e-8
) -> Matrices:
    """SOAP, arXiv:2409.11321 and its authors' code.

    The first gradient only fills factors and bases. Factors take in a gradient after it was used;
    every `every` updates the eigenbasis columns and V are sorted by eigenvalue, then Q = qr(L Q).
    """
    first, updates = grads[0], [np.zeros_like(grads[0])]
    left, right = (1 - b2) * first @ first.T, (1 - b2) * first.T @ first
    ql, qr = _descending(left), _descending(right)
    m, v = np.zeros_like(first), np.zeros_like(first)
    for t, g in enumerate(grads[1:], start=1):
        p = ql.T @ g @ qr
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * p**2
        correction = np.sqrt(1 - b2**t) / (1 - b1**t)
        updates.append(correction * ql @ ((ql.T @ m @ qr) / (np.sqrt(v) + eps)) @ qr.T)
        left = b2 * left + (1 - b2) * g @ g.T
        right = b2 * right + (1 - b2) * g.T @ g
        if t % every == 0:
            rows, columns = _order(left, ql), _order(right, qr)
            v = v[rows][:, columns]
            ql = np.linalg.qr(left @ ql[:, rows])[0]
            qr = np.linalg.qr(right @ qr[:, columns])[0]
    return updates


def kl_shampoo(
    grads: Matrices, b1: float = 0.9, b2: float = 0.98, every: int = 10, eps: float = 1e-8
) -> Matrices:
    """KL-Shampoo, arXiv:2509.03378 and its authors' code.

    U = Ql [(Ql' M Qr) * s / (1 + eps s)] Qr' with s_ij = sl_i sr_j = (dl_i dr_j)^(-1/2). The first
    gradient only fills the state. No bias correction.
    """
    state, updates = _KLState(grads[0], 1 - b2, capped_by_size=True), [np.zeros_like(grads[0])]
    m = np.zeros_like(grads[0])
    for t, g in enumerate(grads[1:], start=1):
        m = b1 * m + (1 - b1) * g
        s = np.outer(state.sl, state.sr)
        updates.append(state.back(state.into(m) * (s / (1 + eps * s))))
        state.accumulate(g, b2)
        if t % every == 0:
            state.refresh()
    return updates


def kl_soap(
    grads: Matrices, b1: float = 0.9, b2: float = 0.98, every: int = 10, eps: float = 1e-8
) -> Matrices:
    """KL-SOAP, arXiv:2509.03378 and its authors' code: Adam in the eigenbasis of the KL factors.

    M is carried into the new basis at each refresh, V is not. No bias correction, no sorting.
    """
    return _kl_adam(grads, _KLState(grads[0], 1 - b2, capped_by_size=True), b1, b2, b2, every, eps)


def record_19(
    grads: Matrices,
    b1: float = 0.95,
    b2: float = 0.9,
    factor_b2: float = 0.9,
    every: int = 1,
    eps: float = 1e-8,
) -> Matrices:
    """Direction of KL-SOAP-H, result 19 of modded-nanogpt's track 3; see `hyperball` for its step.

    Differs from `kl_soap` in that the first gradient enters the factors with weight 1 and that
    s is capped at 4000 whatever the size.
    """
    state = _KLState(grads[0], 1.0, capped_by_size=False)
    return _kl_adam(grads, state, b1, b2, factor_b2, every, eps)


def record_27(
    grads: Matrices, b1: float = 0.95, b2: float = 0.9, every: int = 1, eps: float = 1e-8
) -> Matrices:
    """Direction of SOAP-H, result 27 of modded-nanogpt's track 3; see `hyperball` for its step.

    Q starts as the eigenbases of the first gradient, whose step is not skipped; it is refreshed
    after the update, unsorted, and V is not carried along. No bias correction.
    """
    first, updates = grads[0], []
    left, right = np.zeros((len(first),) * 2), np.zeros((first.shape[1],) * 2)
    ql, qr = _descending(first @ first.T), _descending(first.T @ first)
    m, v = np.zeros_like(first), np.zeros_like(first)
    for t, g in enumerate(grads, start=1):
        m = b1 * m + (1 - b1) * g
        left = b2 * left + (1 - b2) * g @ g.T
        right = b2 * right + (1 - b2) * g.T @ g
        v = b2 * v + (1 - b2) * (ql.T @ g @ qr) ** 2
        updates.append(ql @ ((ql.T @ m @ qr) / (np.sqrt(v) + eps)) @ qr.T)
        if t % every == 0:
            ql, qr = np.linalg.qr(left @ ql)[0], np.linalg.qr(right @ qr)[0]
    return updates


def asgo(
    grads: Matrices, b1: float = 0.9, b2: float = 0.95, every: int = 1, eps: float = 1e-8
) -> Matrices:
    """ASGO in its practical form, arXiv:2503.20762: one-sided Shampoo on the right.

    R = b2 R + (1 - b2) G'G, U = M (R^(1/2) + eps I)^(-1), the root taken at the first step and
    every `every` steps from there. No bias correction. Transpose the gradients for the left side.
    """
    n = grads[0].shape[1]
    m, right, root, updates = np.zeros_like(grads[0]), np.zeros((n, n)), np.eye(n), []
    for t, g in enumerate(grads):
        m = b1 * m + (1 - b1) * g
        right = b2 * right + (1 - b2) * g.T @ g
        if t % every == 0:
            root = np.linalg.inv(_square_root(right) + eps * np.eye(len(right)))
        updates.append(m @ root)
    return updates


def asgo_theory(grads: Matrices, eps: float = 1e-8) -> Matrices:
    """ASGO as analysed, arXiv:2503.20762: L += GG', U = (L^(1/2) + eps I)^(-1) G, no momentum."""
    left, updates = np.zeros((len(grads[0]),) * 2), []
    for g in grads:
        left = left + g @ g.T
        updates.append(np.linalg.inv(_square_root(left) + eps * np.eye(len(left))) @ g)
    return updates


def hyperball(parameter: np.ndarray, update: np.ndarray, lr: float) -> np.ndarray:
    """The parameter after a step of the records' `-H` form, whose Frobenius norm never changes."""
    radius = np.linalg.norm(parameter)
    moved = parameter - lr * radius * update / max(np.linalg.norm(update), 1e-10)
    return radius * moved / max(np.linalg.norm(moved), 1e-10)


class _KLState:
    """KL factors, their bases, and s = d^(-1/2) of their separately tracked eigenvalues d.

    With whitening by the other side's old basis and eigenvalues (W = Q diag(s^2) Q'):
        L <- b L + (1 - b)/n G Wr G',    R <- b R + (1 - b)/m G' Wl G,
        dl <- b dl + (1 - b) mean_j P_ij^2 / dr_j,    dr likewise with the old dl.
    """

    def __init__(self, g: np.ndarray, weight: float, *, capped_by_size: bool):
        m, n = g.shape
        self.left, self.right = weight * g @ g.T / n, weight * g.T @ g / m
        self.ql, self.qr = _descending(self.left), _descending(self.right)
        self.sl, self.sr = np.full(m, 0.1**-0.5), np.full(n, 0.1**-0.5)
        self.capped_by_size = capped_by_size

    def into(self, x: np.ndarray) -> np.ndarray:
        return self.ql.T @ x @ self.qr

    def back(self, x: np.ndarray) -> np.ndarray:
        return self.ql @ x @ self.qr.T

    def accumulate(self, g: np.ndarray, b: float) -> None:
        m, n = g.shape
        whiten_left = self.ql @ np.diag(self.sl**2) @ self.ql.T
        whiten_right = self.qr @ np.diag(self.sr**2) @ self.qr.T
        self.left = b * self.left + (1 - b) * g @ whiten_right @ g.T / n
        self.right = b * self.right + (1 - b) * g.T @ whiten_left @ g / m
        squares = self.into(g) ** 2
        dl = b / self.sl**2 + (1 - b) * np.mean(squares * self.sr**2, axis=1)
        dr = b / self.sr**2 + (1 - b) * np.mean(squares * self.sl[:, None] ** 2, axis=0)
        self.sl, self.sr = self._inverse_sqrt(dl), self._inverse_sqrt(dr)

    def _inverse_sqrt(self, d: np.ndarray) -> np.ndarray:
        cap = max(10, min(len(d), 4000)) if self.capped_by_size else 4000
        return np.minimum(np.maximum(d, 1e-30) ** -0.5, cap)

    def refresh(self) -> None:
        self.ql = np.linalg.qr(self.left @ self.ql)[0]
        self.qr = np.linalg.qr(self.right @ self.qr)[0]


def _kl_adam(
    grads: Matrices, state: _KLState, b1: float, b2: float, factor_b2: float, every: int, eps: float
) -> Matrices:
    updates = [np.zeros_like(grads[0])]
    m, v = np.zeros_like(grads[0]), np.zeros_like(grads[0])  # both in the eigenbasis
    for t, g in enumerate(grads[1:], start=1):
        p = state.into(g)
        m = b1 * m + (1 - b1) * p
        v = b2 * v + (1 - b2) * p**2
        updates.append(state.back(m / (np.sqrt(v) + eps)))
        state.accumulate(g, factor_b2)
        if t % every == 0:
            m_original = state.back(m)
            state.refresh()
            m = state.into(m_original)
    return updates


def _descending(matrix: np.ndarray) -> np.ndarray:
    """Eigenvectors in columns, largest eigenvalue first."""
    return np.linalg.eigh(matrix)[1][:, ::-1]


def _order(matrix: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Columns of the basis by descending estimate diag(Q' A Q)."""
    return np.argsort(-np.diag(basis.T @ matrix @ basis), kind="stable")


def _square_root(matrix: np.ndarray) -> np.ndarray:
    values, basis = np.linalg.eigh(matrix)
    return (basis * np.sqrt(np.maximum(values, 0))) @ basis.T
