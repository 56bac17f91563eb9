"""Makes the project's own small model: writes data/model/ as a Hugging Face directory.

    python data/make_model.py

needs torch, tokenizers and safetensors (nothing else in the project needs torch). The
text comes from corpus.py, the seed is fixed, and the whole run sees 12 million tokens: about
40 minutes on two CPU cores with bfloat16 units and --compile. Progress and held-out
figures are printed as it goes. It can be stopped and started again: every few minutes it
keeps its state (--state), and data/model/ is rewritten. `--steps-scale 0.01` makes a trial run.

The model is a plain llama: RMS norms, rotary positions, grouped-query attention, SwiGLU,
tied embeddings. The tokenizer is a byte-level BPE in which every digit is one token of its
own. It adds no token at the front. The one special token, <|endoftext|>, ends each text and
serves as end, begin and padding token alike: texts are packed one after the other in
training, so to begin with that token is right as well, only not needed.
"""

import argparse
import json
import math
import os
import random
import re
import tempfile
import time
from pathlib import Path

import corpus
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

HERE = Path(__file__).resolve().parent
SEED = 1
END = "<|endoftext|>"
# Wide heads and slow rotation: a key has to be matched over hundreds of tokens, and only the
# dimensions that hardly turn over such a distance can do that.
SHAPE = dict(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=1024,
    rope_theta=1000000.0,
    rms_norm_eps=1e-5,
)

# What the rows of a stage hold: the share of rows with recall, and of those that with chains
# and with bare pairs; the shares of stories, arithmetic and sorting among the other texts.
CHAIN = dict(recall=0.75, chain=0.5, pairs=0.25, mix=(0.08, 0.72, 0.20, 0))
PAIRS = dict(recall=0.7, chain=0.15, pairs=0.4, mix=(0.05, 0.75, 0.20, 0))
FACTS = dict(recall=0.5, chain=0.05, pairs=0.15, mix=(0.04, 0.80, 0.16, 0))
# Stages of training: length of a row in tokens, tokens per step, steps, what the rows hold.
# Recall starts from chains and bare pairs, as without them it does not appear in this
# time; longer rows come once short ones are learned; arithmetic needs many examples.
STAGES = [
    (128, 8192, 300, PAIRS),
    (128, 8192, 500, FACTS),
    (256, 8192, 200, FACTS),
    (512, 8192, 200, FACTS),
    (1024, 8192, 300, FACTS),
]
MATRIX_RATE, OTHER_RATE = 2e-3, 1.5e-3
WARM_UP = 60

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}{{ ' ' + (message['content'] | trim) }}"
    "{%- else -%}{{ ('' if loop.first else '\\n') + (message['content'] | trim) }}{%- endif -%}"
    "{%- endfor -%}"
)


# -------------------------------------------------------------------------- tokenizer

# A word with the blank before it, one digit, punctuation, one white space.
SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s"


def make_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng = random.Random(f"tokenizer {SEED}")
    texts = [corpus.plain(corpus.text(rng, 200, digits=(1, 2, 2, 2, 3))) for _ in range(6000)]
    texts += [f" {key} {key}" for key in corpus.KEYS] * 150
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=SHAPE["vocab_size"],
            special_tokens=[END],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return tokenizer


class Encoder:
    """The tokenizer for the ASCII text of corpus.py, each word looked up only once."""

    def __init__(self, tokenizer):
        self.tokenizer, self.known = tokenizer, {}
        self.end = tokenizer.token_to_id(END)
        self.split = re.compile(r" ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s").findall

    def __call__(self, text):
        ids = []
        for word in self.split(text):
            if word not in self.known:
                self.known[word] = self.tokenizer.encode(word).ids
            ids += self.known[word]
        return ids

    def length(self, text):
        return len(self(text))

    def parts(self, parts):
        """ids and weights of a text, with the end token."""
        ids, weights = [], []
        for string, weight in parts:
            new = self(string)
            ids += new
            weights += [weight] * len(new)
        return ids + [self.end], weights + [weights[-1]]


# ------------------------------------------------------------------------------ model


class Norm(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight.to(x.dtype), SHAPE["rms_norm_eps"])


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def attend(q, k, v):
    """Causal attention, each key and value head shared by several neighbouring query heads."""
    (b, heads, t, dim), kv = q.shape, k.shape[1]
    if t > 128:
        k, v = (z.repeat_interleave(heads // kv, 1) for z in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # The same by hand: for short rows the quicker way.
    later = torch.ones(t, t, dtype=torch.bool).triu(1).repeat(heads // kv, 1)
    score = (q.reshape(b, kv, -1, dim) * dim**-0.5) @ k.transpose(-1, -2)
    return (score.masked_fill(later, float("-inf")).softmax(-1).to(v.dtype) @ v).reshape(
        b, heads, t, dim
    )


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        size, self.dim = SHAPE["hidden_size"], SHAPE["head_dim"]
        self.heads, self.kv = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"]
        self.q_proj = nn.Linear(size, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(size, self.kv * self.dim, bias=False)
        self.v_proj = nn.Linear(size, self.kv * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, size, bias=False)

    def forward(self, x, cos, sin):
        b, t, _ = x.shape
        q = rotate(self.q_proj(x).view(b, t, self.heads, self.dim).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(b, t, self.kv, self.dim).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(b, t, self.kv, self.dim).transpose(1, 2)
        y = attend(q, k, v)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        size, wide = SHAPE["hidden_size"], SHAPE["intermediate_size"]
        self.gate_proj = nn.Linear(size, wide, bias=False)
        self.up_proj = nn.Linear(size, wide, bias=False)
        self.down_proj = nn.Linear(wide, size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = Attention(), MLP()
        self.input_layernorm = Norm(SHAPE["hidden_size"])
        self.post_attention_layernorm = Norm(SHAPE["hidden_size"])

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The names of the weights are those of Hugging Face's LlamaModel."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(SHAPE["vocab_size"], SHAPE["hidden_size"])
        self.layers = nn.ModuleList(Layer() for _ in range(SHAPE["num_hidden_layers"]))
        self.norm = Norm(SHAPE["hidden_size"])
        nn.init.normal_(self.embed_tokens.weight, std=0.04)
        for layer in self.layers:
            for name, p in layer.mlp.named_parameters():
                nn.init.normal_(p, std=0.02 if "down" in name else 0.04)
        dim = SHAPE["head_dim"]
        frequency = SHAPE["rope_theta"] ** (-torch.arange(0, dim, 2).float() / dim)
        angle = torch.outer(
            torch.arange(SHAPE["max_position_embeddings"]).float(), frequency
        ).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.begin_attention(frequency)

    @torch.no_grad()
    def begin_attention(self, frequency):
        """The first weights of attention: close to what recall needs, so that it is learned soon.

        From purely random weights the heads that find a fact had not formed after ten million
        tokens in earlier trials. So, in the first layer, head h begins by looking h + 1 tokens
        back (the embeddings have one constant channel, from which queries and keys get a fixed
        direction, turned by h + 1 positions), and all heads write what they see the same way:
        each token then knows which words stand just before it. In the other layers queries and
        keys begin equal, so that a token attends to those with similar words before them,
        mostly in the dimensions that turn slowly; and the output projection begins as the
        values' transpose, so that what is found is written out as it was.
        """
        dim = SHAPE["head_dim"]
        heads, kv, size = (
            SHAPE["num_attention_heads"],
            SHAPE["num_key_value_heads"],
            SHAPE["hidden_size"],
        )
        embed = self.embed_tokens.weight
        embed[:, 0] = 0.5 * 0.04 * math.sqrt(size)
        constant = embed[0, 0] / embed.pow(2).mean().sqrt()
        for number, layer in enumerate(self.layers):
            a = layer.self_attn
            q, k, v, o = (w.weight for w in (a.q_proj, a.k_proj, a.v_proj, a.o_proj))
            for w in (q, k, v):
                nn.init.normal_(w, std=0.04)
            if number == 0:
                strength = torch.where(frequency > 0.03, 9.0, 0.0) / constant
                q.mul_(0.05)
                k.mul_(0.05)
                for g in range(kv):
                    k[g * dim : (g + 1) * dim, 0] = torch.cat((strength, 0 * strength))
                    v[g * dim : (g + 1) * dim] = v[:dim]
                for h in range(heads):
                    q[h * dim : (h + 1) * dim, 0] = torch.cat(
                        (
                            strength * torch.cos(frequency * (h + 1)),
                            -strength * torch.sin(frequency * (h + 1)),
                        )
                    )
            else:
                scale = torch.where(frequency < 0.005, 2.0, 0.3).repeat(2 * kv)
                k.mul_(scale[:, None])
                k[:, 0] = 0
                for h in range(heads):
                    g = h * kv // heads
                    q[h * dim : (h + 1) * dim] = k[g * dim : (g + 1) * dim]
            v[:, 0] = 0
            for h in range(heads):
                g = h * kv // heads
                o[:, h * dim : (h + 1) * dim] = (0.1 if number else 0.03) * v[
                    g * dim : (g + 1) * dim
                ].T

    def forward(self, ids):
        x = self.embed_tokens(ids)
        x = x.bfloat16() if torch.is_autocast_enabled("cpu") else x
        cos, sin = self.cos[: ids.shape[1]].to(x.dtype), self.sin[: ids.shape[1]].to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def logits(self, x):
        return F.linear(x, self.embed_tokens.weight)


# --------------------------------------------------------------------------- training


def row(rng, encoder, length, recall, chain, pairs, mix):
    """One row of `length` + 1 token ids and the weight of each: texts packed end to end."""
    ids, weights = [], []
    recalls = rng.random() < recall
    while len(ids) <= length:
        room = length + 1 - len(ids)
        if recalls and room >= 48:
            want = room if rng.random() < 0.6 else rng.randint(48, room)
            form = rng.random()
            if form < chain:
                parts = corpus.chain_text(rng, min(want, 256) - 1, encoder.length)
            elif form < chain + pairs:
                parts = corpus.pairs_text(rng, min(want, 256) - 1, encoder.length)
            else:
                parts = corpus.recall_text(
                    rng, want - 1, encoder.length, rng.choice((0.25, 0.5, 0.9))
                )
        else:
            parts = corpus.text(rng, room, mix=mix)
        new, weight = encoder.parts(parts)
        ids += new
        weights += weight
    return ids[: length + 1], weights[: length + 1]


def batch(encoder, step, length, tokens, kind):
    rng = random.Random(f"train {SEED} {step}")
    rows = [row(rng, encoder, length, **kind) for _ in range(tokens // length)]
    ids = torch.tensor([r[0] for r in rows])
    weights = torch.tensor([r[1] for r in rows])
    return ids[:, :-1], ids[:, 1:], weights[:, 1:]


def plan(scale):
    """The stage, less its number of steps, of every step."""
    return [
        (length, tokens, kind)
        for length, tokens, steps, kind in STAGES
        for _ in range(max(1, round(steps * scale)))
    ]


def rate(step, total):
    """Warm-up, level, and a cosine down over the last 60 %."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    x = max(0.0, (step / total - 0.4) / 0.6)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * x))


# ------------------------------------------------------------------------- evaluation


@torch.no_grad()
def teacher_forced(model, encoder, prompts):
    """The share of (prompt, answer) for which greedy generation gives the answer and then stops.

    One forward pass each: greedy generation gives the answer exactly if at each of
    its positions the answer's token is the likeliest one.
    """
    right = 0
    for prompt, answer in prompts:
        head, tail = encoder(prompt), encoder(" " + answer) + [encoder.end]
        logits = model.logits(model(torch.tensor([head + tail[:-1]]))[0, len(head) - 1 :])
        right += logits.argmax(-1).tolist() == tail
    return right / len(prompts)


@torch.no_grad()
def perplexity(model, encoder, n):
    rng, loss, count = random.Random(f"test story {SEED}"), 0.0, 0
    for _ in range(n):
        ask, story = corpus.story_prompt(rng)
        head, tail = encoder(ask), encoder(" " + story) + [encoder.end]
        logits = model.logits(model(torch.tensor([head + tail[:-1]]))[0, len(head) - 1 :])
        loss += F.cross_entropy(logits.float(), torch.tensor(tail), reduction="sum").item()
        count += len(tail)
    return math.exp(loss / count)


def figures(model, encoder, n=100, longest=1024):
    model.eval()
    out = {}
    for length in (64, 128, 256, 512, 768, 1000):
        if length <= longest:
            rng = random.Random(f"test recall {SEED} {length}")
            out[f"recall {length}"] = teacher_forced(
                model,
                encoder,
                [
                    corpus.recall_prompt(
                        rng,
                        rng.randint(2, max(2, length // 60)),
                        length,
                        depth=i % 5 / 4,
                        measure=encoder.length,
                    )
                    for i in range(n)
                ],
            )
    rng = random.Random(f"test invented {SEED}")
    out["recall 256, invented keys"] = teacher_forced(
        model,
        encoder,
        [
            corpus.recall_prompt(rng, 4, min(256, longest), measure=encoder.length, invented=1.0)
            for _ in range(n)
        ],
    )
    for digits in (1, 2, 3, None):
        rng = random.Random(f"test arithmetic {SEED} {digits}")
        out[f"arithmetic {digits or 'mixed'}"] = teacher_forced(
            model, encoder, [corpus.arithmetic_prompt(rng, digits) for _ in range(n)]
        )
    for count in (3, 4, 5, 6):
        rng = random.Random(f"test sorting {SEED} {count}")
        out[f"sorting {count}"] = teacher_forced(
            model, encoder, [corpus.sorting_prompt(rng, count) for _ in range(n)]
        )
    out["story perplexity"] = perplexity(model, encoder, max(4, n // 4))
    model.train()
    return {k: round(v, 3) for k, v in out.items()}


# ----------------------------------------------------------------------------- saving


def save_tokenizer(tokenizer, to):
    tokenizer.save(str(to / "tokenizer.json"))
    write_json(
        to / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_eos_token": False,
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(tokenizer.token_to_id(END)): {
                    "content": END,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
            },
            "bos_token": END,
            "eos_token": END,
            "pad_token": END,
            "clean_up_tokenization_spaces": False,
            "model_max_length": SHAPE["max_position_embeddings"],
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": CHAT_TEMPLATE,
        },
    )


def save_model(model, end, to):
    weights = {
        f"model.{name}": p.detach().bfloat16().contiguous() for name, p in model.named_parameters()
    }
    save_file(weights, str(to / "model.safetensors"), metadata={"format": "pt"})
    (to / "model.safetensors").chmod(0o644)
    write_json(
        to / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "mlp_bias": False,
            "bos_token_id": end,
            "eos_token_id": end,
            "pad_token_id": end,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "pretraining_tp": 1,
            **SHAPE,
            "rope_parameters": {"rope_theta": SHAPE["rope_theta"], "rope_type": "default"},
            "rope_scaling": None,
            "tie_word_embeddings": True,
            "use_cache": True,
            "dtype": "bfloat16",
            "torch_dtype": "bfloat16",
        },
    )
    write_json(
        to / "generation_config.json",
        {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "do_sample": False},
    )


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


# ------------------------------------------------------------------------------- main


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=HERE / "model")
    parser.add_argument(
        "--state",
        type=Path,
        default=Path(tempfile.gettempdir()) / "hpcinfer-model-state.pt",
        help="where the state of an unfinished run is kept",
    )
    parser.add_argument("--steps-scale", type=float, default=1.0, help="fewer steps, for a trial")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--compile", action="store_true", help="use torch.compile (needs a C++ compiler)"
    )
    parser.add_argument("--fresh", action="store_true", help="forget a kept state")
    args = parser.parse_args()

    torch.manual_seed(SEED)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    state = {}
    if args.state.exists() and not args.fresh:
        state = torch.load(args.state, weights_only=True)
    tokenizer = Tokenizer.from_str(state["tokenizer"]) if state else make_tokenizer()
    save_tokenizer(tokenizer, args.out)
    encoder = Encoder(tokenizer)

    model = Llama()
    run = torch.compile(model, dynamic=False) if args.compile else model
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(
            matrices, lr=MATRIX_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    bases = [MATRIX_RATE, OTHER_RATE]
    todo = plan(args.steps_scale)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{tokenizer.get_vocab_size()} tokens, "
        f"{len(todo)} steps on {sum(s[1] for s in todo) / 1e6:.1f} M tokens",
        flush=True,
    )

    start = state.get("step", 0)
    if state:
        model.load_state_dict(state["model"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        print(f"goes on at step {start}", flush=True)

    def keep(step):
        torch.save(
            {
                "shape": SHAPE,
                "steps": len(todo),
                "step": step,
                "model": model.state_dict(),
                "tokenizer": tokenizer.to_str(),
                "optimizers": [o.state_dict() for o in optimizers],
            },
            f"{args.state}.new",
        )
        os.replace(f"{args.state}.new", args.state)
        save_model(model, encoder.end, args.out)

    begun, mean, making = time.time(), None, 0.0
    for step in range(start, len(todo)):
        length = todo[step][0]
        before = time.time()
        ids, targets, weights = batch(encoder, step, *todo[step])
        making += time.time() - before
        for optimizer, base in zip(optimizers, bases, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * rate(step, len(todo))
        keep_at = weights > 0
        with torch.autocast("cpu", torch.bfloat16):
            logits = model.logits(run(ids)[keep_at])
        w = weights[keep_at]
        loss = (
            F.cross_entropy(logits.float(), targets[keep_at], reduction="none") * w
        ).sum() / w.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        done = step + 1
        if done % 20 == 0:
            spent = time.time() - begun
            print(
                f"step {done:5d}  length {length:4d}  loss {mean:.3f}  "
                f"{sum(s[1] for s in todo[start:done]) / spent:,.0f} tokens/s  "
                f"{spent / 60:.1f} min "
                f"({making / spent:.0%} making text)",
                flush=True,
            )
        if done % (50 if done < 200 else 100) == 0 and done < len(todo):
            keep(done)
            print(json.dumps(figures(model, encoder, 20, longest=max(length, 256))), flush=True)

    save_model(model, encoder.end, args.out)
    with torch.no_grad():  # the figures are those of the weights as saved
        for p in model.parameters():
            p.copy_(p.bfloat16().float())
    print(json.dumps(figures(model, encoder, 200), indent=1))
    args.state.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
