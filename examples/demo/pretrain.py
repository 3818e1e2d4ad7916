"""Makes everything `qlora demo` needs: a small Llama base in base/, and train.jsonl and heldout.jsonl.

    pip install torch transformers tokenizers safetensors jinja2
    python pretrain.py [--steps 800]

The corpus comes from world.py; nothing is downloaded. One seed and one thread: the same versions on the same kind of
processor give the same files.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from random import Random

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import world

HERE = Path(__file__).parent
BASE = HERE / "base"
SEED = 20240523
VOCAB_SIZE = 1024
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
SEQUENCE_TOKENS = 256
BATCH = 32
TRAIN_ROWS = 2000
HELDOUT_ROWS = 128
INSTRUCTION = "Write the record: "
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|assistant|>' }}
        {%- generation %}
            {{- message['content'] | trim + eos_token }}
        {%- endgeneration %}
    {%- elif message['role'] in ['system', 'user'] %}
        {{- '<|' + message['role'] + '|>' + message['content'] | trim }}
    {%- else %}
        {{- raise_exception('unknown role: ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}
"""


def chat(messages: list[dict]) -> str:
    """The chat template without its `<s>`, which every document of the corpus gets."""
    end = {"assistant": "</s>"}
    return "".join(f"<|{m['role']}|>{m['content']}{end.get(m['role'], '')}" for m in messages)


def corpus(rng: Random, tokens: int, tokenizer: Tokenizer) -> list[int]:
    """At least `tokens` ids of documents, each between `<s>` and `</s>`."""
    ids: list[int] = []
    while len(ids) < tokens:
        texts = [world.document(rng, chat) for _ in range(1000)]
        for text, encoding in zip(texts, tokenizer.encode_batch(texts)):
            ids += encoding.ids if text.endswith("</s>") else encoding.ids + [SPECIAL_TOKENS.index("</s>")]
    return ids


def train_tokenizer() -> Tokenizer:
    """A byte-level BPE with GPT-2's word pattern; `<s>` is put in front, as in Llama."""
    rng = Random(SEED)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((world.document(rng, chat) for _ in range(20_000)), trainer)
    bos = SPECIAL_TOKENS.index("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer


def train_model(tokenizer: Tokenizer, steps: int) -> tuple[LlamaForCausalLM, float]:
    """The trained model and its mean loss over the last 20 steps."""
    torch.manual_seed(SEED)
    token_id = SPECIAL_TOKENS.index
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=token_id("<s>"),
        eos_token_id=token_id("</s>"),
        pad_token_id=token_id("<pad>"),
    )
    model = LlamaForCausalLM(config)
    ids = torch.tensor(corpus(Random(SEED + 1), steps * BATCH * SEQUENCE_TOKENS, tokenizer))
    batches = ids[: steps * BATCH * SEQUENCE_TOKENS].view(steps, BATCH, SEQUENCE_TOKENS)
    # Muon (Jordan et al. 2024) for the matrices, AdamW for what is not one: embeddings and norms.
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    warmup, decay = 20, max(1, steps // 2)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda s: min((s + 1) / warmup, 1.0, (steps - s) / decay))
        for o in optimizers
    ]
    losses, start = [], time.monotonic()
    for step, batch in enumerate(batches):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if step % 20 == 0 or step + 1 == steps:
            recent = sum(losses[-20:]) / len(losses[-20:])
            print(f"step {step} loss {recent:.4f} {time.monotonic() - start:.0f} s", flush=True)
    return model, sum(losses[-20:]) / len(losses[-20:])


def write_base(tokenizer: Tokenizer, model: LlamaForCausalLM) -> None:
    model.to(torch.bfloat16).save_pretrained(BASE)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=SPECIAL_TOKENS[3:],
        chat_template=CHAT_TEMPLATE.strip(),
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
    wrapped.save_pretrained(BASE, save_jinja_files=False)
    # The name that transformers 4 knows as well as 5.
    path = BASE / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")


def write_instructions() -> None:
    """train.jsonl and heldout.jsonl: no sentence of one is in the other, and a fifth of all names, items and towns
    is kept for the second half of the held-out rows."""
    rng = Random(SEED + 2)
    known, kept = [], []
    for values in (world.NAMES, world.ITEMS, world.TOWNS):
        shuffled = rng.sample(values, len(values))
        cut = len(values) // 5
        kept.append(shuffled[:cut])
        known.append(shuffled[cut:])
    used: set[str] = set()

    def rows(count: int, words: list[list[str]]) -> list[dict]:
        out = []
        while len(out) < count:
            s = world.shipment(rng, *words)
            if s.sentence in used:
                continue
            used.add(s.sentence)
            user = {"role": "user", "content": INSTRUCTION + s.sentence}
            out.append({"messages": [user, {"role": "assistant", "content": world.record(s)}]})
        return out

    files = {
        "train.jsonl": rows(TRAIN_ROWS, known),
        "heldout.jsonl": rows(HELDOUT_ROWS // 2, known) + rows(HELDOUT_ROWS // 2, kept),
    }
    for name, lines in files.items():
        (HERE / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps of 32 x 256 tokens")
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    write_instructions()
    tokenizer = train_tokenizer()
    model, loss = train_model(tokenizer, steps)
    write_base(tokenizer, model)
    made_with = {
        "script": "pretrain.py",
        "seed": SEED,
        "steps": steps,
        "tokens": steps * BATCH * SEQUENCE_TOKENS,
        "loss": round(loss, 4),
        "parameters": sum(p.numel() for p in model.parameters()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
    (BASE / "made_with.json").write_text(json.dumps(made_with, indent=2) + "\n")


if __name__ == "__main__":
    main()
