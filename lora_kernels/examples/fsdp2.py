"""FSDP2: each process holds its share of the 4-bit weights.

torchrun --nproc-per-node 2 -m lora_kernels.examples.fsdp2 MODEL OUT
"""

import sys

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import lora_kernels as lk
from lora_kernels.integrations.distributed import packed_bytes


def main(path: str, out: str, steps: int = 5) -> list[float]:
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, device = dist.get_rank(), torch.device("cpu")
    if cuda:
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    torch.manual_seed(0)  # the same adapters everywhere

    config = lk.QLoRAQuantConfig(quant_storage=torch.bfloat16)  # torch 2.11 shards floating-point weights only
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=config)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")).to(device)
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    here, whole = packed_bytes(model)
    print(f"process {rank} holds {here} of {whole} bytes of 4-bit weights", flush=True)

    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    ids = torch.randint(model.config.vocab_size, (2, 32), device=device, generator=torch.Generator(device).manual_seed(rank))
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(mean.item())

    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    state = get_model_state_dict(model, options=options)
    if rank == 0:
        print("losses", " ".join(f"{loss:.4f}" for loss in losses), flush=True)
        model.save_pretrained(out, state_dict=state)
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
