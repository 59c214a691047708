"""Checks of the exercises of lesson 05."""

import torch

from nanochat_lib.course.grading import (Wrong, exercise, expect, expect_close, expect_equal, expect_shape, expect_type,
                                         shown)

PUBLISHED = ((8.156554524902461, -22.48329292557795, 15.878769915207462),
             (4.042929935166739, -2.808917465908714, 0.5000178451051316),
             (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
             (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
             (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@exercise(difficulty=2, importance=5, minutes=15, hints=[
    "lerp_, mul_, addcmul_ and sub_ change a tensor in place; `w = w - …` makes a new one that nobody sees.",
    "After step 1 first = (1 − β₁)·g: divided by 1 − β₁¹ it is g itself, so the first step is the sign of g.",
    "The decay multiplies the weights by 1 − lr · weight_decay; it never goes into the moments.",
])
def adamw_step(answer):
    w, m, v = torch.tensor([1.0, -2.0]), torch.zeros(2), torch.zeros(2)
    g = torch.tensor([0.5, -3.0])
    returned = answer([w], [g], [m], [v], 1, 0.1, (0.9, 0.96), 0.0, 0.0)
    expect(returned is None, "Return nothing: the step changes its tensors in place.")
    expect(not torch.equal(w, torch.tensor([1.0, -2.0])),
           "The weights are unchanged: change them in place (w.sub_), `w = w - …` makes a new tensor.")
    expect(torch.equal(g, torch.tensor([0.5, -3.0])), "The gradients were changed: they belong to the caller.")
    expect_close(m, 0.1 * g, "After one step the first moment is (1 − β₁)·g; bias correction must not be stored in it.")
    expect_close(v, 0.04 * g * g, "After one step the second moment is (1 − β₂)·g².")
    expect_close(w, torch.tensor([0.9, -1.9]), "Without decay the first step is lr · sign(g): check the bias "
                 "correction of both moments, 1 − β to the power of the step.")
    w = torch.tensor([1.0])
    answer([w], [torch.zeros(1)], [torch.zeros(1)], [torch.zeros(1)], 1, 0.1, (0.9, 0.99), 1e-8, 0.5)
    expect_close(w, torch.tensor([0.95]), "With a zero gradient only the decay is left: w · (1 − lr · weight_decay). "
                 "It does not go through the gradient.")
    w, m, v = torch.zeros(1), torch.zeros(1), torch.zeros(1)
    answer([w], [torch.tensor([1e-6])], [m], [v], 1, 1.0, (0.9, 0.99), 1e-6, 0.0)
    expect_close(w, torch.tensor([-0.5]), "eps is added to the corrected root √second̂, outside the root.", rtol=1e-3)
    weights = [randn(4, 3), randn(5, seed=1)]
    theirs = [torch.nn.Parameter(w.clone()) for w in weights]
    first, second = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    reference = torch.optim.AdamW(theirs, lr=0.05, betas=(0.8, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 5):
        gradients = [randn(*w.shape, seed=10 * step + i) for i, w in enumerate(weights)]
        answer(weights, gradients, first, second, step, 0.05, (0.8, 0.95), 1e-8, 0.1)
        for parameter, gradient in zip(theirs, gradients):
            parameter.grad = gradient.clone()
        reference.step()
        for w, parameter in zip(weights, theirs):
            expect_close(w, parameter.detach(),
                         f"Step {step} differs from torch.optim.AdamW: the correction uses `step`.")


@exercise(difficulty=3, importance=5, minutes=20, hints=[
    "Frobenius norm of each matrix of the stack: torch.linalg.matrix_norm(matrices, keepdim=True).",
    "With gram = x @ x.mT the step is a·x + (b·gram + c·gram@gram) @ x.",
    "If rows > cols, transpose first (x.mT), and transpose the result back.",
])
def polar_express(answer):
    given = randn(2, 6, 6)
    kept = given.clone()
    got = answer(given)
    expect_shape(got, (2, 6, 6), torch.float32)
    expect(torch.equal(given, kept), "The input was changed: make a new tensor for X.")
    diagonal = torch.diag(torch.tensor([1.0, 0.5, 0.1]))[None]
    got = answer(diagonal)
    off = got[0] - torch.diag(got[0].diagonal())
    expect(not off.isfinite().all() or off.abs().max() < 1e-4,
           "A diagonal matrix must stay diagonal: the products are X·Xᵀ·X, matrix by matrix.")
    values = got[0].diagonal()
    if not 0.7 < values.min() <= values.max() < 1.3:
        raise Wrong(f"Singular values 1, 0.5 and 0.1 became {shown(values)}; all should be near 1: check the powers (b "
                    "goes with X³, c with X⁵), and that each triple is used once, in order.")
    exact = torch.tensor([1.0, 0.5, 0.1], dtype=torch.float64) / (1.01 * 1.26**0.5)
    for a, b, c in PUBLISHED:
        exact = a * exact + b * exact**3 + c * exact**5
    expect_close(values, exact, "Close, but not the published polynomials: divide by 1.01 times the Frobenius norm "
                 "first.", rtol=1e-3)
    for shape, kind in (((2, 24, 5), "tall"), ((2, 5, 24), "wide")):
        matrices = randn(*shape, seed=3)
        got = answer(matrices)
        expect_shape(got, shape)
        left, _, right = torch.linalg.svd(matrices.double(), full_matrices=False)
        expect((got.double() - left @ right).abs().max() < 0.15,
               f"A {kind} matrix does not come out near U·Vᵀ of its SVD: if rows > cols use XᵀX, or transpose.")
    scaled = answer(torch.stack((given[0], 1000 * given[1])))
    expect_close(scaled, answer(given), "The size of one matrix of the stack changed another: take the norm of each on "
                 "its own.", rtol=1e-2, atol=1e-3)
    expect(bool(answer(torch.zeros(1, 3, 3)).eq(0).all()),
           "A matrix of zeros must stay zero: guard the division by its norm.")


@exercise(difficulty=1, importance=3, minutes=10, hints=[
    "Round up: -(-rows // world_size).",
    "Both ends are cut to `rows` with min.",
])
def owned_rows(answer):
    got = answer(8, 1, 4)
    expect_type(got, tuple)
    expect_equal(got, (2, 4), "8 rows on 4 ranks: rank 1 owns rows 2 and 3.")
    expect_equal([answer(5, rank, 4) for rank in range(4)], [(0, 2), (2, 4), (4, 5), (5, 5)],
                 "5 rows on 4 ranks are 2, 2, 1, 0: round the piece up, and cut both ends to the number of rows.")
    expect_equal(answer(7, 0, 1), (0, 7), "One rank owns everything.")
    for rows in range(12):
        for world_size in range(1, 7):
            owned = [row for rank in range(world_size) for row in range(*answer(rows, rank, world_size))]
            expect_equal(owned, list(range(rows)), f"{rows} rows on {world_size} ranks: each needs one owner.")


@exercise(difficulty=2, importance=4, minutes=15, hints=[
    "The first step: fresh zero buffers, step=1. Measure (w_after − w_before).norm().",
    "Muon: muon_step(w, g, torch.zeros_like(w), second_moment_like(w), lr, momentum, beta2, 0.0), w (1, 64, 32).",
])
def step_growth(answer):
    expect_type(answer, dict)
    missing = {"sgd", "adamw", "muon"} - set(answer)
    expect(not missing, f"The answer lacks {', '.join(sorted(missing))}.")
    got = {name: float(value) for name, value in answer.items()}
    expect(abs(got["sgd"] - 1000) < 1,
           "Gradient descent's step is lr · g: a thousand times the gradient is a thousand times the step.")
    for name in ("adamw", "muon"):
        expect(abs(got[name] - 1) < 0.05, f"Measure {name} again: fresh buffers, step 1, the same seed for both.")
