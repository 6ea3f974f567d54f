"""The compiled kernels behind `kernels`; the only module that imports numba.

Loops index the whole matrix (`pre[row, j]`): handed a row as a slice, the compiler keeps bounds in registers and the
loops take three times as long.
"""

import numpy as np
from numba import njit

__all__ = ["entry_products", "group_entries", "topk_rows"]


@njit(nogil=True, cache=True)
def topk_rows(pre, k, values, indices):
    """Write the k largest entries of every row, in ascending order of index; of equal ones the first stay.

    pre: (n_rows, d_sae); values, indices: (n_rows, k). One pass over a row collects what exceeds a bound guessed from
    the row before; when too little does, the pass is repeated without a bound. Whenever the buffer is full it is cut
    down to its k largest, which raises the bound. A row without k comparable entries (NaN) is given NaN values.
    """
    nothing = np.float32(-np.inf)
    kept, where = np.empty(4 * k + 64, np.float32), np.empty(4 * k + 64, np.int32)
    work = np.empty_like(kept)
    multiple = nothing  # of a row's root mean square, where its k largest are expected to begin
    for row in range(pre.shape[0]):
        scale = _root_mean_square(pre, row)
        n = _collect(pre, row, k, multiple * scale, kept, where, work) if scale > 0 else 0
        if n < k:
            n = _collect(pre, row, k, nothing, kept, where, work)
        if _cut(k, n, kept, where, work) < k:
            values[row], indices[row], multiple = np.nan, 0, nothing
            continue
        for i in range(k):
            values[row, i], indices[row, i] = kept[i], where[i]
        multiple = np.float32(0.85) * kept[:k].min() / scale if scale > 0 else nothing


@njit(nogil=True, cache=True)
def group_entries(latents, starts, offsets, permutation, tokens):
    """Order entries by latent, those of one latent as they were: a counting sort, two sweeps over the entries.

    latents, permutation, tokens: (n_entries,), the latter two are written; starts: (n_tokens + 1,), where the entries
    of each token begin; offsets: (d_sae + 1,) zeros, written with where those of each latent begin.
    """
    for latent in latents:
        offsets[latent + 1] += 1
    for latent in range(1, len(offsets)):
        offsets[latent] += offsets[latent - 1]
    place = offsets.copy()
    for token in range(len(starts) - 1):
        for entry in range(starts[token], starts[token + 1]):
            latent = latents[entry]
            permutation[place[latent]], tokens[place[latent]] = entry, token
            place[latent] += 1


@njit(nogil=True, cache=True, fastmath=True)
def entry_products(latents, starts, first, last, rows, vectors, products):
    """Write rows[token] · vectors[latent] for every entry of the tokens first … last - 1.

    latents, products: (n_entries,); starts: (n_tokens + 1,); rows: (n_tokens, d_in); vectors: (d_sae, d_in).
    """
    for token in range(first, last):
        for entry in range(starts[token], starts[token + 1]):
            latent, total = latents[entry], np.float32(0)
            for i in range(rows.shape[1]):
                total += rows[token, i] * vectors[latent, i]
            products[entry] = total


@njit(nogil=True, cache=True, fastmath=True)
def _root_mean_square(pre, row):
    total = np.float32(0)
    for j in range(pre.shape[1]):
        total += pre[row, j] * pre[row, j]
    return np.sqrt(total / np.float32(pre.shape[1]))


@njit(nogil=True, cache=True)
def _collect(pre, row, k, bound, kept, where, work):
    """Collect a row's entries above the bound, cut down whenever the buffer is full; returns their number."""
    n = 0
    for j in range(pre.shape[1]):
        if pre[row, j] > bound:
            if n == len(kept):
                n = _cut(k, n, kept, where, work)
                bound = kept[:k].min()
                if pre[row, j] <= bound:
                    continue
            kept[n], where[n] = pre[row, j], j
            n += 1
    return n


@njit(nogil=True, cache=True)
def _cut(k, n, kept, where, work):
    """Keep the k largest of n entries in their order, the first of equal ones; returns k, or n if there are fewer."""
    if n <= k:
        return n
    work[:n] = kept[:n]
    lowest = _kth_largest(work, n, k)
    ties = k
    for i in range(n):
        ties -= kept[i] > lowest
    m = 0
    for i in range(n):
        if kept[i] > lowest or (kept[i] == lowest and ties > 0):
            ties -= kept[i] == lowest
            kept[m], where[m] = kept[i], where[i]
            m += 1
    return m


@njit(nogil=True, cache=True)
def _kth_largest(work, n, k):
    """The k-th largest of work[:n] (quickselect; reorders work)."""
    low, high, target = 0, n - 1, k - 1
    while low < high:
        pivot, i, j = work[(low + high) // 2], low, high
        while i <= j:
            while work[i] > pivot:
                i += 1
            while work[j] < pivot:
                j -= 1
            if i <= j:
                work[i], work[j] = work[j], work[i]
                i, j = i + 1, j - 1
        if target <= j:
            high = j
        elif target >= i:
            low = i
        else:
            break
    return work[target]
