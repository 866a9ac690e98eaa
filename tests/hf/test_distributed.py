"""Two processes: DDP, FSDP2 and FSDP1 train to the losses of one process, and the packed weights really are sharded.

This file is also the program that torchrun starts: it writes what it saw as JSON, and the tests judge it.
"""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import as_bitsandbytes, bits, tiny_llama, torchrun
from tiny_folder import chats, make_folder, write_jsonl
from torch import nn

import lora_kernels as lk
from lora_kernels.requirements import missing

CPU = torch.device("cpu")
KINDS = ["own", "bitsandbytes"]
IDS = torch.arange(4 * 18).reshape(4, 18) * 7 % 96


SHARDS_BYTES = missing("torch", "2.12") is None
STORAGE = {} if SHARDS_BYTES else {"quant_storage": torch.bfloat16}
"""How weights are packed that FSDP2 shards: before torch 2.12 it takes floating-point parameters only."""


def build(kind, **quant):
    from peft import LoraConfig, get_peft_model

    lk.enable_peft()
    model = lk.apply_qlora(tiny_llama(), r=0, **quant)
    if kind == "bitsandbytes":
        as_bitsandbytes(model)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=8, target_modules="all-linear"))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.05)
    return model


def steps(model, ids, reduce=True, n=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for i in range(n):
        loss = model(input_ids=ids * (i + 1) % 96, labels=ids * (i + 1) % 96).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.detach().clone()
        if reduce:
            dist.all_reduce(loss, dist.ReduceOp.AVG)
        losses.append(loss.item())
    return losses


def shard(model, **options):
    from torch.distributed.fsdp import fully_shard

    for layer in model.base_model.model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def scales(model):
    weights = [m.quantized_weight for m in model.modules() if hasattr(m, "quantized_weight")]
    return [t for qw in weights for t in (qw.absmax, qw.absmax2, qw.code2, qw.offset)]


def adapters_of_a_sharded_model(out, rank):
    """`save_adapter` and `load_adapter`; rank 1 and odd sizes leave a process with less than the other, or nothing."""
    from torch.distributed.fsdp import fully_shard

    one = lk.apply_qlora(tiny_llama(), r=1, lora_alpha=2)
    for layer in lk.model.fused_layers(one).values():
        nn.init.normal_(layer.lora_B["default"].weight, std=0.05)
    want = one(IDS).logits
    if rank == 0:
        lk.save_adapter(one, f"{out}.one")
    dist.barrier()
    model = lk.apply_qlora(tiny_llama(), r=1, lora_alpha=2, **STORAGE)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    lk.load_adapter(model, f"{out}.one")
    lk.save_adapter(model, f"{out}.two")
    files = [Path(f"{out}.{name}", "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    got = {"adapter file": files[0] == files[1], "adapter logits": torch.equal(model(IDS).logits, want), "adapter errors": []}
    for call in (lambda: lk.load_adapter(model, f"{out}.one", "other"), lambda: lk.save_adapter(model, "/dev/null/x")):
        try:
            call()
        except Exception as e:
            got["adapter errors"].append(f"{type(e).__name__}: {e}")
    return got


def program(out):
    """What each process does."""
    from accelerate import Accelerator
    from torch.distributed.checkpoint import load, save
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy

    from lora_kernels import processes
    from lora_kernels.integrations.distributed import load_full_state_dict, packed_bytes

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, accelerator = dist.get_rank(), Accelerator(cpu=True)
    mine = IDS[2 * rank : 2 * rank + 2]
    seen = {"together": []}
    for failing in (None, 0, 1):
        try:
            with processes.together():
                if rank == failing:
                    raise ValueError("bad file")
        except Exception as e:
            seen["together"].append(f"{type(e).__name__}: {e}")
    for kind in KINDS:
        seen[kind] = got = {}
        one = build(kind, **STORAGE)
        state = {k: v.clone() for k, v in one.state_dict().items()}
        got["one"] = steps(one, IDS, reduce=False)
        got["ddp"] = steps(nn.parallel.DistributedDataParallel(build(kind)), mine)
        got["accelerate"] = steps(accelerator.prepare_model(build(kind)), mine)

        model = shard(build(kind, **STORAGE))
        got["bytes"] = packed_bytes(model)
        got["fused"] = len(lk.verify(model, strict=True).fused)
        full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        if rank == 0:
            got["full"] = full.keys() == state.keys() and all(torch.equal(bits(full[k]), bits(state[k])) for k in state)
        got["fsdp2"] = steps(model, mine)

        before = [t.clone() for t in scales(one)]
        bf16 = shard(
            build(kind, **STORAGE), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16), reshard_after_forward=False
        )
        got["bf16"] = steps(bf16, mine)
        got["scales"] = all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(scales(bf16), before, strict=True))

        sharded = get_model_state_dict(model)  # the trained model, through a distributed checkpoint
        save(sharded, checkpoint_id=f"{out}.{kind}.dcp")
        again = shard(build(kind, **STORAGE))
        sharded = get_model_state_dict(again)
        load(sharded, checkpoint_id=f"{out}.{kind}.dcp")
        set_model_state_dict(again, sharded)
        a, b = (steps(m, mine, n=1) for m in (model, again))
        got["dcp"] = a == b

        if kind == "own":
            got |= adapters_of_a_sharded_model(f"{out}.adapter", rank)

        if kind == "own":  # made on the meta device, filled by process 0
            empty = shard(copy.deepcopy(build(kind, **STORAGE)).to("meta")).to_empty(device="cpu")
            with torch.no_grad():
                for m in empty.modules():  # what no state dict holds
                    if hasattr(m, "inv_freq"):
                        m.inv_freq.copy_(one.base_model.model.model.rotary_emb.inv_freq)
            load_full_state_dict(empty, state if rank == 0 else {})
            got["meta"] = steps(empty, mine)

    # FSDP1 flattens the parameters of a block, which must share a dtype: the packed weight is held in that of LoRA
    model = build("own", quant_storage=torch.float32)
    seen["fsdp1"] = steps(FullyShardedDataParallel(model, use_orig_params=True, device_id=CPU), mine)
    try:
        FullyShardedDataParallel(build("own"), use_orig_params=True, device_id=CPU)
        seen["fsdp1 uint8"] = ""
    except ValueError as e:
        seen["fsdp1 uint8"] = str(e)
    try:
        shard(build("own"))
        seen["fsdp2 uint8"] = ""
    except RuntimeError as e:
        seen["fsdp2 uint8"] = str(e)
    Path(f"{out}.{rank}").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    program(sys.argv[1])
    sys.exit()


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    out = tmp_path_factory.mktemp("ranks") / "seen"
    done = torchrun(__file__, out)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [json.loads(Path(f"{out}.{i}").read_text()) for i in range(2)]
    for kind in KINDS:
        print(kind, ranks[0][kind])
    return ranks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["ddp", "accelerate", "fsdp2"])
def test_losses_are_those_of_one_process(seen, kind, way):
    assert seen[0][kind][way] == pytest.approx(seen[0][kind]["one"], rel=1e-5)
    assert seen[0][kind][way] == seen[1][kind][way]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_weights_are_sharded_and_fused(seen, kind):
    halves = [rank[kind]["bytes"] for rank in seen]
    assert halves[0][0] + halves[1][0] == halves[0][1]
    assert abs(halves[0][0] / halves[0][1] - 0.5) < 0.01
    assert seen[0][kind]["fused"] == 14


@pytest.mark.parametrize("kind", KINDS)
def test_a_bf16_policy_leaves_the_scales_alone(seen, kind):
    assert all(rank[kind]["scales"] for rank in seen)
    assert seen[0][kind]["bf16"] == pytest.approx(seen[0][kind]["one"], rel=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dicts_are_whole(seen, kind):
    """The gathered one equals that of one process, byte for byte; a distributed checkpoint brings the model back."""
    assert seen[0][kind]["full"]
    assert all(rank[kind]["dcp"] for rank in seen)


def test_adapters_of_a_sharded_model(seen):
    for rank in seen:
        assert rank["own"]["adapter file"]
        assert rank["own"]["adapter logits"]
    missing, unwritable = seen[0]["own"]["adapter errors"]
    assert "down_proj is sharded and has no adapter 'other': give it one of rank 1 before fully_shard" in missing
    assert unwritable.startswith("NotADirectoryError")
    assert seen[1]["own"]["adapter errors"] == [missing, "AnotherProcessError: process 0 failed"]


def test_a_model_from_the_meta_device(seen):
    assert seen[0]["own"]["meta"] == pytest.approx(seen[0]["own"]["one"], rel=1e-5)


def test_fsdp1_needs_quant_storage(seen):
    assert seen[0]["fsdp1"] == pytest.approx(seen[0]["own"]["one"], rel=1e-5)
    assert "uniform dtype" in seen[0]["fsdp1 uint8"]


def test_fsdp2_of_bytes_needs_torch_2_12(seen):
    assert bool(seen[0]["fsdp2 uint8"]) != SHARDS_BYTES


def test_processes_fail_together(seen):
    """The one that failed raises its error, the other one says which failed; a block that passes everywhere passes."""
    assert seen[0]["together"] == ["ValueError: bad file", "AnotherProcessError: process 1 failed"]
    assert seen[1]["together"] == ["AnotherProcessError: process 0 failed", "ValueError: bad file"]


def test_one_process_can_not_be_loaded_as_several():
    from lora_kernels.integrations.distributed import load_full_state_dict

    with pytest.raises(RuntimeError, match="torchrun"):
        load_full_state_dict(nn.Linear(2, 2), {})


# ---- lora-kernels finetune under torchrun


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    pytest.importorskip("typer")
    path = tmp_path_factory.mktemp("finetune")
    make_folder(path / "model")
    write_jsonl(path / "data.jsonl", chats(30))
    return path


ONE_IS_SLOW = """
import os, time
from transformers import Trainer
from lora_kernels.cli import main

save = Trainer._save_rng_state
Trainer._save_rng_state = lambda *args: (time.sleep(float(os.environ["RANK"])), save(*args))
main()
"""


def test_finetune_is_that_of_one_process(folder):
    """The same files, and the losses and the adapter of one process with the same global batch; also where a process is late to
    write its part of a checkpoint."""
    from rich.console import Console
    from safetensors.torch import load_file

    from lora_kernels.app.finetune import Settings, finetune

    options = {"lr": 1e-2, "max_steps": 7, "eval_fraction": 0.2, "evals": 1, "dtype": "float32", "grad_accum": 2}
    words = [f"--{k.replace('_', '-')}={v}" for k, v in options.items()]
    program = folder / "one_is_slow.py"
    program.write_text(ONE_IS_SLOW)
    several = [program, "finetune", folder / "model", "--data", folder / "data.jsonl", "--out", folder / "two"]
    done = torchrun(*several, *words, "--batch-size=1")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("2 processes") == done.stdout.count("log.json and loss.png are in") == 1
    settings = Settings(str(folder / "model"), str(folder / "data.jsonl"), str(folder / "one"), batch_size=2, **options)
    one = finetune(settings, console=Console(quiet=True)).log
    two = json.loads((folder / "two" / "log.json").read_text())
    assert two["processes"] == 2
    for rows in ("history", "held_out"):
        assert [r["step"] for r in two[rows]] == [r["step"] for r in one[rows]]
        assert [r["loss"] for r in two[rows]] == pytest.approx([r["loss"] for r in one[rows]], rel=1e-5)
    assert two["tokens"] == one["tokens"]
    a, b = (load_file(folder / d / "adapter_model.safetensors") for d in ("one", "two"))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=1e-4)
    files = [{p.name for p in (folder / d).rglob("*") if "rng_state" not in p.name} for d in ("one", "two")]
    assert files[0] == files[1]
    assert len(list((folder / "two").rglob("rng_state_*.pth"))) == 2 * len(list((folder / "one").rglob("rng_state.pth"))) > 0
    again = replace(settings, out=str(folder / "two"), batch_size=1, max_steps=9)
    with pytest.raises(ValueError, match="processes is 1 now and was 2"):
        finetune(again, resume=True, console=Console(quiet=True))


@pytest.mark.parametrize(
    ("failed", "said"), [(None, ""), ([True, True], ""), ([False, True], "process 1: error: ")], ids=["early", "both", "alone"]
)
def test_the_second_process_speaks_when_it_alone_fails(folder, failed, said, monkeypatch):
    from typer.testing import CliRunner

    from lora_kernels import processes
    from lora_kernels.app import cli

    bad = write_jsonl(folder / "bad.jsonl", [{"what": "is this"}])
    words = ["finetune", folder / "model", "--data", bad, "--out", folder / "refused"]
    monkeypatch.setattr(cli, "FIRST", False)
    monkeypatch.setenv("RANK", "1")
    if failed:
        monkeypatch.setattr(processes, "rank", lambda: 1)
        monkeypatch.setattr(processes, "world_size", lambda: 2)
        monkeypatch.setattr(processes, "gather", lambda value: failed)
    done = CliRunner().invoke(cli.app, list(map(str, words)))
    assert done.exit_code == 2
    assert done.stderr.startswith(said) and bool(done.stderr) == bool(said)
    assert not (folder / "refused").exists()
