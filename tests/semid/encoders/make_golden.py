"""Makes golden/{bert,t5,t5_gated}: tiny random models of torch's transformers, and what they say of a few texts.

Needs torch, transformers and tokenizers; run from the repository's root: python tests/semid/encoders/make_golden.py
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers.implementations import BertWordPieceTokenizer
from transformers import BertConfig, BertModel, BertTokenizer, T5Config, T5EncoderModel

FOLDER = Path(__file__).parent / "golden"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, "matte", "lip", "##stick", "##s", "red", "engine", "oil", ",", ".", "a", "the"]
TEXTS = ["Matte red lipsticks", "the engine, the oil.", "lip", "matte matte matte unheard red red oil oil"]
LENGTHS = (7, 3, 12)
SMALL = {"d_model": 8, "d_kv": 3, "d_ff": 12, "num_layers": 2, "num_heads": 2, "vocab_size": len(WORDS)}
MODELS = {
    "bert": lambda: BertModel(
        BertConfig(
            vocab_size=len(WORDS),
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=12,
            max_position_embeddings=16,
        )
    ),
    # Few buckets and small distances, so that all kinds of them are met.
    "t5": lambda: T5EncoderModel(
        T5Config(**SMALL, relative_attention_num_buckets=8, relative_attention_max_distance=10)
    ),
    "t5_gated": lambda: T5EncoderModel(T5Config(**SMALL, feed_forward_proj="gated-gelu")),
}


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens of rows of several lengths."""
    mask = torch.arange(max(LENGTHS))[None] < torch.tensor(LENGTHS)[:, None]
    tokens = torch.randint(5, len(WORDS), mask.shape)
    return tokens * mask, mask


@torch.no_grad()
def make(name: str) -> None:
    """One folder: a model as `save_pretrained` leaves it, its tokenizer's files, and `expected.safetensors`."""
    torch.manual_seed(0)
    model, folder = MODELS[name]().eval(), FOLDER / name
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn_like(parameter)  # fresh biases are zero and fresh norms one: they would hide
    tokens, mask = batch()
    out = model(input_ids=tokens, attention_mask=mask.long(), output_hidden_states=True)
    real = mask[..., None]
    expected = {
        "tokens": tokens.int(),
        "mask": mask,
        "states": out.last_hidden_state,
        "mean": (out.last_hidden_state * real).sum(1) / real.sum(1),
        "cls": out.last_hidden_state[:, 0].clone(),
        "first": (out.hidden_states[0] * real).sum(1) / real.sum(1),
        "second": (out.hidden_states[1] * real).sum(1) / real.sum(1),
    }
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    save_file(expected, folder / "expected.safetensors")
    write_tokenizer(folder)


def write_tokenizer(folder: Path) -> None:
    """vocab.txt and the tokenizer.json of the same WordPiece, cut and padded by itself as MiniLM's is."""
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = BertWordPieceTokenizer(str(folder / "vocab.txt"))
    tokenizer.enable_truncation(6)
    tokenizer.enable_padding(length=6)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)


if __name__ == "__main__":
    for each in MODELS:
        make(each)
    print(BertTokenizer.from_pretrained(FOLDER / "bert")(TEXTS)["input_ids"])  # stands in test_vocabulary.py
