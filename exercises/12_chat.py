# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3 (ipykernel)
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 12 · Exercises: chat
#
# Three pieces of the bookkeeping between a model and those who talk to it, and one question to answer by measuring. The
# lesson is [12 · Chat](../lessons/12_chat.ipynb).

# %%
import heapq
import random

from nanochat_lib.course.checks import chat as check

# %% [markdown]
# ## 1 · A stop string that comes in pieces
#
# difficulty 3/5 · importance 4/5 · 20 minutes
#
# An answer is to end before the first of some stop strings. It comes bit by bit, and what is on the screen cannot be
# taken back. Given the text that has come but has not been shown, return `(shown, held, ended)`: what may be shown
# now, what must wait since it may turn out to begin a stop string (no more than that), and whether the answer has
# ended. After the end nothing is held.

# %%
def hold_back(text, stops):
    """text: what has come and is not shown yet; stops: non-empty strings → (shown, held, ended)."""
    raise NotImplementedError  # your code here

# %%
check.hold_back(hold_back)

# %% [markdown]
# ## 2 · Reading a stream that is cut anywhere
#
# difficulty 3/5 · importance 4/5 · 25 minutes
#
# A server sends events: each is one or more lines `data: …`, then an empty line. The network cuts the bytes wherever
# it likes, between two lines or inside a character. Yield the data of each event as a string, as soon as its empty
# line is there; several data lines of one event are joined by a line break. Lines end with `\n` or `\r\n`; one blank
# after the colon is not part of the data; lines of other fields (`event: …`, `id: …`) and comments (`: …`) are
# skipped; an event without data is none. `[DONE]` ends it all, and is not yielded.

# %%
def events(chunks):
    """chunks: iterable of bytes → the events' data, strings, as they become complete."""
    raise NotImplementedError  # your code here

# %%
check.events(events)

# %% [markdown]
# ## 3 · What to forget
#
# difficulty 2/5 · importance 4/5 · 15 minutes
#
# A conversation grows until the context is full. Leave out the oldest exchanges (a question with its answer), as few
# as possible, so that `count(messages)`, the tokens of what is left, is at most `budget`. A system message at the
# start stays, and so does the last message, even if that alone is too long. The list you were given is not changed.

# %%
def fit(messages, count, budget):
    """messages: [system], user, assistant, user, …, user; count(messages) → tokens. Returns the messages to keep."""
    raise NotImplementedError  # your code here

# %%
check.fit(fit)

# %% [markdown]
# ## 4 · How long may the line grow?
#
# difficulty 1/5 · importance 3/5 · 10 minutes
#
# A server writes 8 answers at once, each in about 2 seconds, so it answers 4 questions a second. Now 6 a second
# arrive. A line of some length takes the surplus; whoever finds it full is refused at once. `simulate(line)` gives
# the share of refused questions and the wait that 99 % of the others did not exceed. What is the longest line (in
# steps of 4) with which that wait stays under 10 seconds? Then double the line. How many more are served? And could
# you have known the answer without a simulation?

# %%
def simulate(line, rate=6.0, rows=8, seconds=2000.0, seed=0):
    """(share refused, 99 % wait in seconds) of questions that come at random, `rate` a second."""
    dice, now, busy, waits, refused = random.Random(seed), 0.0, [], [], 0
    starts = []  # when those in line, and those before them, begin to be answered
    while (now := now + dice.expovariate(rate)) < seconds:
        starts = [start for start in starts if start > now]  # still in line
        if len(starts) >= line and len(busy) >= rows and busy[0] > now:
            refused += 1
            continue
        start = max(now, heapq.heappop(busy)) if len(busy) >= rows else now
        heapq.heappush(busy, start + dice.uniform(1.5, 2.5))
        starts.append(start)
        waits.append(start - now)
    return refused / (refused + len(waits)), sorted(waits)[int(0.99 * len(waits))]


for length in (0, 8, 64):
    print(length, "in line: refused {:.0%}, wait {:.1f} s".format(*simulate(length)))

# %%
answer = None
# your code here

# %%
check.longest_line(answer)
