"""What the commands do, on a tiny model of each kind whose folders transformers reads in a way of its own: experts joined, keys
renamed, weights joined, images beside text."""

import json

import pytest
import torch
from helpers import assert_same_bits
from safetensors.torch import load_file, save_file
from tiny_folder import chats, make_folder, make_tokenizer, save_with_tokenizer, write_jsonl

from lora_kernels.model import fused_layers
from lora_kernels.report import verify
from lora_kernels.requirements import installed

for package in ("transformers", "rich"):
    pytest.importorskip(package)
import transformers as hf  # noqa: E402
from rich.console import Console  # noqa: E402

from lora_kernels.app.finetune import Settings, finetune  # noqa: E402
from lora_kernels.app.folders import save_merged, save_quantized  # noqa: E402
from lora_kernels.app.generate import answer  # noqa: E402
from lora_kernels.app.load import load_model, load_quantized, load_with_adapter  # noqa: E402
from lora_kernels.integrations import quantizer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
HEADS = {"head_dim": 16}
LATENT = {"q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
IMAGES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
NO_DROPOUT = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}

FAMILIES = {
    "mixtral": lambda: hf.MixtralConfig(**GROUPED, num_local_experts=4),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **GROUPED, **HEADS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32
    ),
    "olmoe": lambda: hf.OlmoeConfig(**GROUPED, num_experts=4, num_experts_per_tok=2),
    "granitemoe": lambda: hf.GraniteMoeConfig(**GROUPED, num_local_experts=4),
    "minimax": lambda: hf.MiniMaxConfig(
        **GROUPED, **HEADS, num_local_experts=4, block_size=16, layer_types=["full_attention", "linear_attention"]
    ),
    "deepseek_v2": lambda: hf.DeepseekV2Config(
        **SIZES, **LATENT, num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        n_group=1, topk_group=1, first_k_dense_replace=1,
    ),
    "gpt_neox": lambda: hf.GPTNeoXConfig(**SIZES),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=320, n_positions=128, n_embd=64, n_layer=2, n_head=4, **NO_DROPOUT, bos_token_id=None, eos_token_id=0
    ),
    "hrm_text": lambda: hf.HrmTextConfig(**GROUPED, **HEADS),
    "gemma3": lambda: hf.Gemma3Config(
        text_config=GROUPED | HEADS, vision_config=IMAGES | {"patch_size": 14}, mm_tokens_per_image=4
    ),
    "llava": lambda: hf.LlavaConfig(
        text_config=hf.LlamaConfig(**GROUPED), vision_config=hf.CLIPVisionConfig(**IMAGES, patch_size=14), image_token_index=5
    ),
    "qwen2_vl": lambda: hf.Qwen2VLConfig(
        text_config=GROUPED | MROPE, vision_config={"depth": 1, "embed_dim": 64, "hidden_size": 64, "num_heads": 2}
    ),
}  # fmt: skip


IDS = torch.arange(6, 36).reshape(3, 10)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_from_dense_to_merged(family, tmp_path):
    """quantize, then generate, finetune and merge from the folder that it wrote."""
    config = FAMILIES[family]()
    makers = (hf.AutoModelForCausalLM, hf.AutoModelForImageTextToText)
    maker = makers[family in ("llava", "qwen2_vl")]
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    original = maker.from_config(config, dtype=torch.float32)
    save_with_tokenizer(original, tokenizer, tmp_path / "dense")

    in_memory, tokenizer, already = load_quantized(tmp_path / "dense")
    assert not already
    assert type(in_memory) is type(original)
    save_quantized(in_memory, tokenizer, tmp_path / "q")
    model, tokenizer, already = load_quantized(tmp_path / "q")
    assert already
    assert fused_layers(model).keys() == fused_layers(in_memory).keys()
    assert len(fused_layers(model)) > 6
    assert_same_bits(logits(model), logits(in_memory))
    assert {row.name for row in verify(model).rows if row.quant_type} == set(fused_layers(model))
    if installed("bitsandbytes"):
        stock = maker.from_pretrained(tmp_path / "q", dtype=torch.float32).train()
        torch.testing.assert_close(stock(input_ids=IDS).logits, logits(model), rtol=1e-4, atol=1e-4)

    run = tmp_path / "run"
    settings = Settings(str(tmp_path / "q"), str(write_jsonl(tmp_path / "data.jsonl", chats(8))), str(run), max_steps=2)

    result = finetune(settings, console=Console(quiet=True))
    assert result.log["steps"] == 2
    tuned, tokenizer, how = load_with_adapter(str(tmp_path / "q"), run, torch.float32)
    assert how == "4 bits already"
    assert answer(tuned, tokenizer, "the fox", 3) is not None
    want = logits(tuned)
    assert not torch.equal(want, logits(model))
    save_merged(tuned, tokenizer, tmp_path / "merged", torch.float32)
    merged, _ = load_model(tmp_path / "merged")
    assert not fused_layers(merged)
    assert type(merged) is type(original)
    torch.testing.assert_close(logits(merged), want, rtol=1e-4, atol=1e-4)
    stock = maker.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert_same_bits(logits(stock), logits(merged))


def test_joined_bytes_are_refused(tmp_path, monkeypatch):
    """What a folder would hold if `save_pretrained` joined packed weights as it joins dense ones."""
    torch.manual_seed(0)
    original = hf.AutoModelForCausalLM.from_config(FAMILIES["hrm_text"](), dtype=torch.float32)
    save_with_tokenizer(original, make_tokenizer(), tmp_path / "dense")
    monkeypatch.setattr(quantizer, "forget_conversions", lambda *_: None)
    model, tokenizer, _ = load_quantized(tmp_path / "dense")
    save_quantized(model, tokenizer, tmp_path / "q")
    with pytest.raises(ValueError, match=r"q can't be loaded: .*\.weight is \[\d+, 1\]: the parts of a 4-bit weight were not"):
        load_quantized(tmp_path / "q")


def store_in_shards(folder):
    """model.safetensors in three files with an index, as a large model comes."""
    tensors = load_file(folder / "model.safetensors")
    where = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({n: t for n, t in tensors.items() if where[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "model.safetensors").unlink()


def store_for_torch(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("store", [store_in_shards, store_for_torch])
def test_ways_to_store(store, tmp_path):
    """Dense and in 4 bits, in several files and in torch's own."""
    make_folder(tmp_path / "dense")
    in_memory, tokenizer, _ = load_quantized(tmp_path / "dense")
    save_quantized(in_memory, tokenizer, tmp_path / "q")
    for name in ("dense", "q"):
        store(tmp_path / name)
        model, _, already = load_quantized(tmp_path / name)
        assert already == (name == "q")
        assert_same_bits(logits(model), logits(in_memory))


def test_a_4bit_folder_that_holds_more_than_its_model_is_refused(tmp_path):
    """Part of a model must not be trained in place of the whole."""
    make_folder(tmp_path / "dense")
    in_memory, tokenizer, _ = load_quantized(tmp_path / "dense")
    save_quantized(in_memory, tokenizer, tmp_path / "q")
    config = json.loads((tmp_path / "q/config.json").read_text())
    n = config["num_hidden_layers"] - 1
    fewer = {"num_hidden_layers": n, "layer_types": None}
    (tmp_path / "q/config.json").write_text(json.dumps(config | fewer))
    with pytest.raises(ValueError, match=rf"q can't be loaded: the model has no model\.layers\.{n}\."):
        load_quantized(tmp_path / "q")


def test_gguf(tmp_path):
    """Read by transformers in 16 bits, quantized then; the folder that is written holds the same."""
    gguf = pytest.importorskip("gguf")
    fast = make_tokenizer().backend_tokenizer
    bpe = json.loads(fast.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    for name, value in {
        "block_count": 1, "context_length": 128, "embedding_length": 64, "feed_forward_length": 128, "head_count": 4,
        "head_count_kv": 4, "layer_norm_rms_eps": 1e-5, "rope_dimension_count": 16, "rope_freq_base": 1e4,
        "vocab_size": len(tokens), "tokenizer_model": "gpt2", "token_list": tokens, "token_types": [1] * len(tokens),
        "token_merges": [" ".join(pair) for pair in bpe["merges"]], "bos_token_id": 0, "eos_token_id": 0,
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    square, wide, tall = (64, 64), (128, 64), (64, 128)
    shapes = {f"blk.0.attn_{part}": square for part in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": wide, "blk.0.ffn_up": wide, "blk.0.ffn_down": tall, "token_embd": (len(tokens), 64)}
    shapes |= dict.fromkeys(("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"), (64,))
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", torch.randn(shape).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    in_memory, tokenizer, already = load_quantized(tmp_path / "tiny.gguf", torch.float32)
    assert not already
    assert len(fused_layers(in_memory)) == 7
    save_quantized(in_memory, tokenizer, tmp_path / "q")
    model, _, already = load_quantized(tmp_path / "q")
    assert already
    assert_same_bits(logits(model), logits(in_memory))
