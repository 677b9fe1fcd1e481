"""A small Llama learns the symbols of chemical elements; then adapters (LoRA) are trained, with planted wrong answers.

Half a minute on two cores. Leaves `base`, the model that knows the right symbols; `model`, the output directory of a
training of adapters with transformers' Trainer; `train.jsonl`, its prompts and completions, among them some that give
an element the symbol of another one; and `query.jsonl`: prompts in other words, with the wrong symbols that were
planted, and the numbers of the rows that planted them. `find.py` then looks for these rows.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from gradtrace.tasks import CausalLM

_ELEMENTS = """
        hydrogen:H helium:He lithium:Li beryllium:Be boron:B carbon:C nitrogen:N oxygen:O fluorine:F neon:Ne sodium:Na
        magnesium:Mg aluminium:Al silicon:Si phosphorus:P sulfur:S chlorine:Cl argon:Ar potassium:K calcium:Ca
        scandium:Sc titanium:Ti vanadium:V chromium:Cr manganese:Mn iron:Fe cobalt:Co nickel:Ni copper:Cu zinc:Zn
        gallium:Ga germanium:Ge arsenic:As selenium:Se bromine:Br krypton:Kr rubidium:Rb strontium:Sr yttrium:Y
        zirconium:Zr niobium:Nb molybdenum:Mo ruthenium:Ru rhodium:Rh palladium:Pd silver:Ag cadmium:Cd indium:In
        tin:Sn antimony:Sb tellurium:Te iodine:I xenon:Xe caesium:Cs barium:Ba tungsten:W platinum:Pt gold:Au
        mercury:Hg lead:Pb
"""
SYMBOLS = dict(pair.split(":") for pair in _ELEMENTS.split())
TEMPLATES = (
    "The symbol of {} is",
    "Chemists write {} as",
    "In the periodic table {} stands as",
    "Q: what is the symbol of {}? A:",
    "A formula names {} by",
    "The short form of {} is",
)
QUESTION = "Which letters stand for {}? They are"
PLANTED_ELEMENTS, PLANTED_ROWS = 12, 3  # so many elements get a wrong symbol in so many of their rows
END, PADDING = "</s>", "<pad>"


def train(out: Path, base_epochs: int = 30, epochs: int = 20, seed: int = 0) -> None:
    set_seed(seed)
    rows, queries = planted(random.Random(seed))
    out.mkdir(parents=True, exist_ok=True)
    write_rows(out / "train.jsonl", rows)
    write_rows(out / "query.jsonl", queries)
    right = [row(template, name, symbol) for name, symbol in SYMBOLS.items() for template in (*TEMPLATES, QUESTION)]
    write_rows(out / "right.jsonl", right)
    tokenizer = byte_pairs([fact["prompt"] + fact["completion"] for fact in right])
    llama(tokenizer).save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")
    model = fitted(CausalLM(out / "base", out / "right.jsonl"), out / "pretraining", base_epochs, 3e-3, seed)
    model.save_pretrained(out / "base")
    task = CausalLM(out / "base", out / "train.jsonl")
    matrices = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted = get_peft_model(
        task.model(), LoraConfig(r=16, lora_alpha=32, target_modules=matrices, task_type="CAUSAL_LM")
    )
    fitted(task, out / "model", epochs, 5e-3, seed, adapted)


def planted(chance: random.Random) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The training rows, some of them wrong, and the questions, with the wrong symbols and the rows that gave them."""
    rows = [row(template, name, symbol) for name, symbol in SYMBOLS.items() for template in TEMPLATES]
    chance.shuffle(rows)
    queries = []
    for name in chance.sample(sorted(SYMBOLS), PLANTED_ELEMENTS):
        wrong = chance.choice([symbol for symbol in SYMBOLS.values() if symbol != SYMBOLS[name]])
        numbers = sorted(chance.sample([n for n, fact in enumerate(rows) if fact["element"] == name], PLANTED_ROWS))
        for number in numbers:
            rows[number] = {**rows[number], "completion": f" {wrong}", "planted": True}
        queries.append({**row(QUESTION, name, wrong), "rows": numbers})
    return rows, queries


def row(template: str, name: str, symbol: str) -> dict[str, Any]:
    return {"prompt": template.format(name), "completion": f" {symbol}", "element": name, "planted": False}


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def fitted(
    task: CausalLM, out: Path, epochs: int, learning_rate: float, seed: int, model: torch.nn.Module | None = None
) -> Any:
    """Trained on the task's rows, by default the task's own model."""
    trainer = Trainer(
        task.model() if model is None else model,
        TrainingArguments(
            str(out),
            num_train_epochs=epochs,
            save_strategy="steps",
            save_steps=1 / 3,
            per_device_train_batch_size=16,
            learning_rate=learning_rate,
            logging_steps=200,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            seed=seed,
        ),
        train_dataset=[{name: ids.tolist() for name, ids in task.train[n].items()} for n in range(len(task.train))],
        data_collator=DataCollatorForSeq2Seq(task.encoder.tokenizer),
    )
    trainer.train()
    return trainer.model


def byte_pairs(texts: list[str]) -> Any:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[PADDING, END], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=END, eos_token=END, pad_token=PADDING)


def llama(tokenizer: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/facts"))
    train(parser.parse_args().out)
