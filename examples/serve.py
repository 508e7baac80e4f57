"""Trains a small byte-level transformer, and serves it with continuous batching over a cache in pages.

    python examples/serve.py --output serve_output

The model reads the bytes of Python's standard library under the mask of `train_bytes.py`: a causal window and the first
bytes of each text, with rotary positions and grouped heads. Then requests arrive at random times, each with a prompt
of held-out text, and leave when they have what they asked for, or earlier. The keys and values of all requests are in
one array of pages per layer; a `PagePool` says whose page is whose.

Every step is one call of one compiled program with room for a fixed number of tokens. Each decoding request has one of
them, and chunks of prompts fill what is left: a long prompt stops nobody. Where pages run out, the request that came
last gives its pages back and is computed again later. Sizes never change, so nothing is compiled while serving.

The text streams to the terminal, a line of a request at a time. Printed at the end are tokens per second, the time to
the first token, and the memory held beside that of a dense cache. Some requests are greedy; a plain forward pass of
the whole text, without any cache, must choose the same bytes. Written are `summary.json` and `serve.png`.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rotary import rotary
from tqdm import tqdm
from train_bytes import standard_library_text

from jax_bsk import decode, sparse_attention
from jax_bsk.masks import CausalMask, GlobalMask, LocalMask, Mask

# How far below the largest logit a greedy byte may lie in the plain pass, which rounds differently. Measured on two CPU
# cores in float32: 0 in every run, as no two bytes were ever that close.
TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of a run; the defaults take about a minute on two CPU cores.

    Attributes:
      steps: Training steps at most.
      seconds: Seconds of training at most.
      length: Tokens of a training sequence, and of a request with its answer at most.
      window: Positions that a query attends to, its own included.
      sinks: First positions that every query attends to.
      requests: Number of requests.
      gap: Mean number of steps between two arrivals.
      prompt: Bytes of a prompt at most.
      answer: Bytes of an answer at most.
      budget: Tokens of a step.
      slots: Requests of a step at most.
      pages: Pages of the cache.
      page_size: Positions of a page.
      temperature: Temperature of the requests that are sampled; every third one is greedy.
      checked: Greedy requests that the plain pass checks.
    """

    steps: int = 300
    seconds: int = 35
    length: int = 512
    batch: int = 2
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    window: int = 128
    sinks: int = 16
    learning_rate: float = 4e-3
    requests: int = 48
    gap: float = 6.0
    prompt: int = 256
    answer: int = 160
    budget: int = 64
    slots: int = 16
    pages: int = 144
    page_size: int = 16
    temperature: float = 0.6
    checked: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.prompt + self.answer > self.length:
            raise SystemExit(f"a prompt and its answer have up to {self.length} bytes: make --length larger")
        if self.pages * self.page_size < self.length or self.budget < self.slots:
            raise SystemExit("the pages hold one request of full length or more, and a step one token for each slot")

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def mask(self) -> Mask:
        return CausalMask() & (LocalMask((self.window - 1, 0)) | GlobalMask(self.sinks))

    @property
    def max_pages(self) -> int:
        return -(-self.length // self.page_size)


# ---- the model: what attention is, the caller says ----

Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]  # (layer, query, key, value) -> output


class Layer(nnx.Module):
    """A pre-norm transformer layer with grouped heads."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        width, options = config.width, {"use_bias": False, "rngs": rngs}
        self.norm_1 = nnx.LayerNorm(width, rngs=rngs)
        self.query = nnx.LinearGeneral(width, (config.heads, config.head_dim), **options)
        self.key = nnx.LinearGeneral(width, (config.kv_heads, config.head_dim), **options)
        self.value = nnx.LinearGeneral(width, (config.kv_heads, config.head_dim), **options)
        self.out = nnx.LinearGeneral((config.heads, config.head_dim), width, axis=(-2, -1), **options)
        self.norm_2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array, positions: jax.Array, attend: Callable[..., jax.Array]) -> jax.Array:
        normed = self.norm_1(x)
        query, key = rotary(self.query(normed), positions), rotary(self.key(normed), positions)
        x = x + self.out(attend(query, key, self.value(normed)))
        return x + self.down(nnx.gelu(self.up(self.norm_2(x))))


class Model(nnx.Module):
    """Predicts the next byte."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(256, config.width, rngs=rngs)
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.layers)])
        self.norm = nnx.LayerNorm(config.width, rngs=rngs)
        self.head = nnx.Linear(config.width, 256, rngs=rngs)

    def __call__(self, tokens: jax.Array, positions: jax.Array, attend: Attend) -> jax.Array:
        """Features of tokens [..., T], whose positions are [..., T]; `logits` makes logits of them."""
        x = self.embedding(tokens)
        for number, layer in enumerate(self.layers):
            x = layer(x, positions, functools.partial(attend, number))
        return x

    def logits(self, features: jax.Array) -> jax.Array:
        return self.head(self.norm(features)).astype(jnp.float32)


def plain_logits(model: Model, tokens: jax.Array, mask: Mask) -> jax.Array:
    """Logits [B, T, 256] of whole sequences: what is trained, and what the served text is checked by."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    return model.logits(model(tokens, positions, lambda _, q, k, v: sparse_attention(q, k, v, mask=mask)))


def train(config: Config, text: np.ndarray) -> tuple[Any, Any, list[float]]:
    """The model's structure, its trained parameters, and the losses."""
    graphdef, params = nnx.split(Model(config, nnx.Rngs(config.seed)))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1.0))  # a step multiplies by its rate

    def loss_fn(params, tokens):
        logits = plain_logits(nnx.merge(graphdef, params), tokens[:, :-1], config.mask)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, tokens, rate):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        updates = jax.tree.map(lambda update: rate * update, updates)
        return optax.apply_updates(params, updates), opt_state, loss

    rng, opt_state, losses = np.random.default_rng(config.seed), optimizer.init(params), []
    started = time.perf_counter()
    bar = tqdm(range(config.steps), desc="training", unit="step", dynamic_ncols=True)
    for number in bar:
        # The rate falls to 0 at the end, which is that of the steps or of the seconds, whichever comes first.
        past = max(number / config.steps, (time.perf_counter() - started) / config.seconds)
        if past >= 1:
            break
        rate = config.learning_rate * min(1, (number + 1) / 20) * (1 - past)
        starts = rng.integers(0, len(text) - config.length - 1, config.batch)
        rows = np.stack([text[start : start + config.length + 1] for start in starts]).astype(np.int32)
        params, opt_state, loss = step(params, opt_state, rows, jnp.float32(rate))
        losses.append(float(loss))
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return graphdef, params, losses


# ---- requests ----


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt that is to be continued, and where it stands.

    Attributes:
      number: Number of the request.
      arrives: Step at which it arrives.
      text: Bytes of the prompt, and behind them the answer.
      prompt: Number of bytes of the prompt.
      answer: Number of bytes that it asks for.
      leaves: Number of bytes after which it is given up; more than `answer` means never.
      greedy: Whether the most likely byte is taken, or one is drawn.
      sequence: Its number in the pool; None while it waits.
      preempted: How often it gave its pages back before it was done.
      arrived: Time of the arrival, in seconds.
      first: Time of the first byte.
    """

    number: int
    arrives: int
    text: list[int]
    prompt: int
    answer: int
    leaves: int
    greedy: bool
    sequence: int | None = None
    cached: int = 0
    preempted: int = 0
    arrived: float = 0.0
    first: float | None = None

    @property
    def pending(self) -> int:
        """Bytes that are not in the cache: one where it decodes, more of a prompt."""
        return len(self.text) - self.cached

    @property
    def done(self) -> bool:
        return len(self.text) - self.prompt >= min(self.answer, self.leaves)


def draw_requests(config: Config, text: np.ndarray) -> list[Request]:
    """Prompts of held-out text, with random arrivals and lengths; every sixth request is given up halfway."""
    rng = np.random.default_rng(config.seed + 1)
    arrivals = np.floor(np.cumsum(rng.exponential(config.gap, config.requests))).astype(int)
    requests = []
    for number, arrives in enumerate(arrivals):
        prompt = int(rng.integers(8, config.prompt + 1))
        answer = int(rng.integers(8, config.answer + 1))
        start = int(rng.integers(0, len(text) - prompt))
        leaves = answer // 2 if number % 6 == 5 else answer + 1
        given = text[start : start + prompt].tolist()
        requests.append(Request(number, int(arrives), given, prompt, answer, leaves, greedy=number % 3 == 0))
    return requests


# ---- the engine ----


class Batch(NamedTuple):
    """The arrays of a step, with room for `budget` tokens and `slots` requests."""

    tokens: np.ndarray  # [budget]
    positions: np.ndarray  # [budget]
    kv_lens: np.ndarray  # [slots], bytes in the cache after the step
    page_indices: np.ndarray  # [slots, max_pages]
    cu_q_lens: np.ndarray  # [slots + 1]
    num_seqs: np.ndarray  # [1]
    numbers: np.ndarray  # [slots], of the requests
    greedy: np.ndarray  # [slots]


class Engine:
    """Continuous batching: who is in the next step, with how many tokens, and whose pages are whose."""

    def __init__(self, config: Config, graphdef: Any, params: Any):
        self.config, self.params = config, params
        self.pool = decode.PagePool(config.pages, config.page_size)
        shape = (config.pages, config.page_size, 2 * config.kv_heads, config.head_dim)
        self.caches = [jnp.zeros(shape, jnp.float32) for _ in range(config.layers)]
        self.waiting: collections.deque[Request] = collections.deque()
        self.running: list[Request] = []  # those that came first stand first
        self.history: list[dict[str, int]] = []
        step = jax.jit(functools.partial(serve_step, config, graphdef), donate_argnums=1)
        self._program = step.lower(params, self.caches, self._batch([])).compile()  # the one and only compilation

    def step(self) -> Iterator[tuple[Request, int]]:
        """One call of the program; yields the requests that got a byte, which is in their text, with the byte."""
        self._admit()
        plan = self._plan()
        self.caches, chosen = self._program(self.params, self.caches, self._batch(plan))
        chosen = np.asarray(chosen)
        self.history.append(
            {
                "decoding": sum(count for request, count in plan if request.pending == 1),
                "prompts": sum(count for request, count in plan if request.pending > 1),
                "pages": self.pool.pages_held,
                "positions": sum(self.pool.length(sequence) for sequence in self.pool.sequences),
                "waiting": len(self.waiting),
            }
        )
        now = time.perf_counter()
        for (request, count), byte in zip(plan, chosen.tolist(), strict=False):
            request.cached += count
            if request.pending:  # a prompt that is not complete
                continue
            request.text.append(byte)
            request.first = now if request.first is None else request.first
            if request.done:
                self._leave(request)
            yield request, byte

    def _admit(self) -> None:
        """Lets waiting requests in, in their order, while there are pages for their texts and one more for each."""
        while self.waiting and len(self.running) < self.config.slots:
            request = self.waiting[0]
            wanted = sum(self.pool.pages_for(len(r.text)) + 1 for r in (*self.running, request))
            if self.running and wanted > self.config.pages:
                break
            self.waiting.popleft()
            request.sequence, request.cached = self.pool.allocate(0), 0
            self.running.append(request)

    def _plan(self) -> list[tuple[Request, int]]:
        """Requests of the next step with their numbers of tokens: those that decode first, then chunks of prompts."""
        plan: dict[Request, int] = {}
        left = self.config.budget
        for request in sorted(self.running, key=lambda request: request.pending > 1):
            count = min(request.pending, left)
            if count and request in self.running and self._extend(request, count):
                plan[request] = count
                left -= count
        return [(request, count) for request, count in plan.items() if request in self.running]

    def _extend(self, request: Request, count: int) -> bool:
        """Takes pages for a request's next tokens, if need be from those that came last; False if it is one of them."""
        while request.sequence is not None:
            try:
                self.pool.extend(request.sequence, count)
                return True
            except decode.PagesExhausted:
                last = self.running[-1]
                self._leave(last)
                last.preempted += 1
                self.waiting.appendleft(last)
        return False

    def _leave(self, request: Request) -> None:
        assert request.sequence is not None
        self.pool.free(request.sequence)
        self.running.remove(request)
        request.sequence = None

    def _batch(self, plan: list[tuple[Request, int]]) -> Batch:
        config = self.config
        tokens, positions = np.zeros((2, config.budget), np.int32)
        numbers, greedy = np.zeros(config.slots, np.int32), np.zeros(config.slots, bool)
        offsets = np.zeros(config.slots + 1, np.int32)
        for slot, (request, count) in enumerate(plan):
            first, last = offsets[slot], offsets[slot] + count
            tokens[first:last] = request.text[request.cached : request.cached + count]
            positions[first:last] = np.arange(request.cached, request.cached + count)
            numbers[slot], greedy[slot] = request.number, request.greedy
            offsets[slot + 1 :] = last
        sequences = [request.sequence for request, _ in plan if request.sequence is not None]
        return Batch(
            tokens,
            positions,
            self.pool.kv_lens(sequences, config.slots),
            self.pool.page_table(sequences, config.max_pages, config.slots),
            offsets,
            np.array([len(plan)], np.int32),
            numbers,
            greedy,
        )


def serve_step(config: Config, graphdef: Any, params: Any, caches: list[jax.Array], batch: Batch) -> Any:
    """The caches with the tokens of a step, and the next byte of each request."""
    model, caches = nnx.merge(graphdef, params), list(caches)
    where = (batch.kv_lens, batch.page_indices, batch.cu_q_lens, batch.num_seqs)

    def attend(layer: int, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        caches[layer] = decode.append_pages(caches[layer], key, value, *where)
        return decode.ragged_paged_attention(
            query,
            caches[layer],
            *where,
            sm_scale=config.head_dim**-0.5,
            sliding_window=config.window,
            sink_tokens=config.sinks,
        )

    features = model(batch.tokens, batch.positions, attend)
    logits = model.logits(features[jnp.maximum(batch.cu_q_lens[1:] - 1, 0)])  # of each request's last token

    def draw(logits: jax.Array, number: jax.Array, length: jax.Array) -> jax.Array:
        # A key per request and position: what is drawn does not depend on who else is in the batch.
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), number), length)
        return jax.random.categorical(key, logits / config.temperature)

    drawn = jax.vmap(draw)(logits, jnp.asarray(batch.numbers), jnp.asarray(batch.kv_lens))
    return caches, jnp.where(batch.greedy, logits.argmax(-1), drawn)


def serve(engine: Engine, requests: Sequence[Request], show: Callable[[Request, int], None]) -> dict[str, float]:
    """Serves all requests; returns what was measured."""
    coming = collections.deque(sorted(requests, key=lambda request: request.arrives))
    started, step = time.perf_counter(), 0
    while coming or engine.waiting or engine.running:
        if not engine.waiting and not engine.running:
            step = max(step, coming[0].arrives)  # nothing to do until then
        while coming and coming[0].arrives <= step:
            coming[0].arrived = time.perf_counter()
            engine.waiting.append(coming.popleft())
        for request, byte in engine.step():
            show(request, byte)
        step += 1
    seconds = time.perf_counter() - started

    config, history = engine.config, engine.history
    first = [request.first - request.arrived for request in requests if request.first is not None]
    position = sum(cache.nbytes for cache in engine.caches) // (config.pages * config.page_size)
    peak = max(entry["pages"] for entry in history)
    return {
        "seconds": seconds,
        "steps": len(history),
        "mixed_steps": sum(entry["decoding"] > 0 < entry["prompts"] for entry in history),
        "tokens": sum(len(request.text) - request.prompt for request in requests),
        "prompt_tokens": sum(entry["prompts"] for entry in history),
        "tokens_per_second": sum(len(request.text) - request.prompt for request in requests) / seconds,
        "first_token_median_seconds": float(np.median(first)),
        "first_token_worst_seconds": max(first),
        "preemptions": sum(request.preempted for request in requests),
        "given_up": sum(request.leaves < request.answer for request in requests),
        "peak_pages": peak,
        "peak_bytes": engine.pool.page_size * position * peak,
        "cache_bytes": engine.pool.page_size * position * config.pages,
        "dense_bytes": position * config.slots * config.length,
    }


def check(config: Config, graphdef: Any, params: Any, requests: Sequence[Request]) -> dict[str, float]:
    """Compares greedy answers with a plain pass over the whole text; raises SystemExit where one differs."""
    greedy = sorted((r for r in requests if r.greedy), key=lambda request: -request.preempted)[: config.checked]
    rows = np.zeros((len(greedy), config.length), np.int32)
    for row, request in zip(rows, greedy, strict=True):
        row[: len(request.text)] = request.text
    logits = jax.jit(lambda params, rows: plain_logits(nnx.merge(graphdef, params), rows, config.mask))(params, rows)
    compared, largest = 0, 0.0
    for row, request in zip(np.asarray(logits), greedy, strict=True):
        answer = np.array(request.text[request.prompt :])
        before = row[request.prompt - 1 : len(request.text) - 1]  # whose largest logit is the next byte's
        gap = float((before.max(-1) - before[np.arange(len(answer)), answer]).max(initial=0))
        if not gap <= TOLERANCE:  # NaN fails too
            raise SystemExit(f"request {request.number} differs from the plain pass: a logit lies {gap:.1e} lower")
        compared, largest = compared + len(answer), max(largest, gap)
    return {"requests": len(greedy), "tokens": compared, "largest_gap": largest}


# ---- report ----


class Stream:
    """Prints what requests get, a line at a time."""

    def __init__(self, quiet: bool):
        self._quiet, self._lines = quiet, collections.defaultdict(bytearray)

    def __call__(self, request: Request, byte: int) -> None:
        line = self._lines[request.number]
        if byte != ord("\n"):
            line.append(byte)
        if (byte == ord("\n") or request.done) and not self._quiet:
            end = "" if not request.done else "  [given up]" if request.leaves < request.answer else "  [done]"
            print(f"{request.number:4d} | {line.decode(errors='replace').rstrip()}{end}", flush=True)
        if byte == ord("\n"):
            line.clear()


def report(run: dict, output: Path) -> dict:
    """Prints what was measured, and writes picture and numbers."""
    config, served, checked = Config(**run["config"]), run["served"], run["checked"]
    first, worst = served["first_token_median_seconds"], served["first_token_worst_seconds"]
    print(
        f"\n{run['device']}: {config.layers} layers of {config.heads} heads on {config.kv_heads} of {config.head_dim}; "
        f"trained for {len(run['losses'])} steps, loss {run['losses'][0]:.2f} to {run['losses'][-1]:.2f}.\n"
        f"{config.requests} requests, {served['given_up']} of them given up halfway, in {served['steps']} steps of "
        f"{config.budget} tokens;\n{served['mixed_steps']} steps had tokens of prompts and of answers. "
        f"{served['preemptions']} times a request gave its pages back.\n"
    )
    print(f"tokens per second      {served['tokens_per_second']:12,.0f}   (and prompts: {served['prompt_tokens']:,})")
    print(f"time to first token    {first * 1e3:9.0f} ms   (median; the longest {worst * 1e3:.0f} ms)")
    print(f"memory, most held      {served['peak_bytes'] / 2**10:9,.0f} KiB  ({served['peak_pages']} pages)")
    print(f"memory of all pages    {served['cache_bytes'] / 2**10:9,.0f} KiB  ({config.pages} pages)")
    print(f"memory, dense cache    {served['dense_bytes'] / 2**10:9,.0f} KiB  ({config.slots} x {config.length})")
    print(
        f"\n{checked['requests']} greedy answers, {checked['tokens']:,} bytes, are those of a plain forward pass "
        f"(largest gap {checked['largest_gap']:.0e})."
    )
    (output / "summary.json").write_text(json.dumps(run, indent=1) + "\n")
    plot(config, run["history"], output / "serve.png")
    print(f"Written to {output}/: summary.json, serve.png")
    return run


def plot(config: Config, history: list[dict[str, int]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6), dpi=150, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    steps = np.arange(len(history))
    decoding, prompts, pages, positions, waiting = (
        np.array([entry[name] for entry in history])
        for name in ("decoding", "prompts", "pages", "positions", "waiting")
    )
    top.bar(steps, decoding, width=1, color="#24557a", label="answers")
    top.bar(steps, prompts, width=1, bottom=decoding, color="#f2b56b", label="prompts")
    top.plot(steps, waiting, color="black", linewidth=0.8, label="requests that wait")
    top.set(ylabel="tokens of a step", title="prompts fill what answers leave")
    bottom.plot(steps, pages * config.page_size, color="#24557a", label="positions of held pages")
    bottom.plot(steps, positions, color="#f2b56b", label="bytes in them")
    dense, room = config.slots * config.length, config.pages * config.page_size
    bottom.axhline(room, color="gray", linewidth=0.8, label=f"all pages (a dense cache: {dense:,})")
    bottom.set(xlabel="step", ylabel="positions")
    top.legend(frameon=False, fontsize=8, loc="upper right")
    bottom.legend(frameon=False, fontsize=8, loc="lower center")
    figure.savefig(path)


def main(argv: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("serve_output"), help="folder for picture and numbers")
    parser.add_argument("--quiet", action="store_true", help="do not print the text")
    for field in dataclasses.fields(Config):
        kind = {"int": int, "float": float}[str(field.type)]
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    arguments = vars(parser.parse_args(argv))
    output, quiet = arguments.pop("output"), arguments.pop("quiet")
    output.mkdir(parents=True, exist_ok=True)
    config = Config(**arguments)

    text = standard_library_text()
    known, held_out = np.split(text, [len(text) * 9 // 10])
    graphdef, params, losses = train(config, known)
    engine = Engine(config, graphdef, params)
    requests = draw_requests(config, held_out)
    served = serve(engine, requests, Stream(quiet))
    if engine.pool.pages_held:
        raise SystemExit(f"{engine.pool.pages_held} pages are held, and no request is left")
    run = {
        "device": f"{os.cpu_count()} CPU cores" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind,
        "config": dataclasses.asdict(config),
        "losses": losses,
        "served": served,
        "checked": check(config, graphdef, params, requests),
        "history": engine.history,
    }
    return report(run, output)


if __name__ == "__main__":
    main()
