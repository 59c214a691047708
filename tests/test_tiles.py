"""What a block of queries visits: tiles, bytes and steps, against counting pair by pair and against the softmax."""

import pytest
import torch

from nanochat_lib.tiles import tile_kinds, traffic, walk


@pytest.mark.parametrize("window", [None, 0, 1, 7, 8, 20, 63, 100])
def test_kinds_and_bytes_by_counting_pairs(window):
    T, block = 64, 8
    seen = [[0 <= i - j <= (T if window is None else window) for j in range(T)] for i in range(T)]
    kinds, visited = tile_kinds(T, block, window), 0
    for row in range(T // block):
        for column in range(T // block):
            pairs = [seen[row * block + i][column * block + j] for i in range(block) for j in range(block)]
            assert kinds[row, column] == (0 if not any(pairs) else 1 if all(pairs) else 2)
            visited += block * any(pairs)  # keys read for this block of queries
    assert traffic(T, 16, block, window) == {"q, out": 2 * 2 * T * 16, "k, v": 2 * 2 * visited * 16, "scores": 0}
    assert traffic(T, 16, naive=True)["scores"] == 4 * 2 * T * T


@pytest.mark.parametrize("start,M,n,window", [(0, 4, 4, None), (24, 8, 8, 17), (24, 8, 8, 0), (5, 3, 4, 2), (31, 1, 8, 31)])
def test_every_step_is_the_softmax_of_what_was_seen_so_far(start, M, n, window):
    generator = torch.Generator().manual_seed(start)
    q, k, v = (9 * torch.randn(rows, 8, generator=generator) for rows in (M, 32, 32))
    steps = walk(q, k, v, start, n, window)
    scores = (q.double() @ k.double().T) / 8**0.5
    distance = torch.arange(start, start + M)[:, None] - torch.arange(32)
    scores = scores.masked_fill((distance < 0) | (distance > (99 if window is None else window)), -torch.inf)
    for step in steps:
        part = scores[:, :(step.tile + 1) * n]
        some = part.isfinite().any(1)
        torch.testing.assert_close(step.out[some].double(), (part.softmax(1) @ v[:part.size(1)].double())[some], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close((step.top + step.total.log())[some].double(), part.logsumexp(1)[some], rtol=1e-5, atol=1e-4)
        assert torch.equal(step.out[~some], torch.zeros_like(step.out[~some])) and step.out.isfinite().all()
    assert [step.tile for step in steps] == sorted({int(j) // n for _, j in torch.nonzero(scores.isfinite())})
