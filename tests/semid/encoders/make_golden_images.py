"""Writes golden/{vit,clip,clip_vision,dinov2}: tiny models of random weights, and what torch makes of pictures.

Run with a Python that has torch and transformers (made with 5.23.0): python tests/semid/encoders/make_golden_images.py
"""

import json
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file

FOLDER = Path(__file__).parent / "golden"
SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 2}
CLIP = {"intermediate_size": 12, "projection_dim": 4, "image_size": 6}


def models() -> dict[str, torch.nn.Module]:
    """ViT as a classifier, CLIP with both towers, DINOv2 trained at another size than pictures come in."""
    vision = transformers.CLIPVisionConfig(**SIZES, **CLIP)
    narrow = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = transformers.CLIPTextConfig(**narrow, vocab_size=4, max_position_embeddings=2, eos_token_id=3)
    clip = transformers.CLIPConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), projection_dim=4)
    return {
        "vit": transformers.ViTForImageClassification(
            transformers.ViTConfig(**SIZES, intermediate_size=12, image_size=6)
        ),
        "clip": transformers.CLIPModel(clip),
        "clip_vision": transformers.CLIPVisionModel(vision),
        "dinov2": transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, mlp_ratio=2, image_size=10)),
    }


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """Weights large enough that every one of them matters."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def backbone(model: torch.nn.Module) -> torch.nn.Module:
    return getattr(model, "vit", getattr(model, "vision_model", model))


def main() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 6, 6, 3), np.uint8)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    processor = {"do_normalize": True, "image_mean": mean, "image_std": std, "resample": 2}
    sizes = {"vit": {"size": {"height": 6, "width": 6}}, "clip_vision": {"size": 6, "crop_size": 6}}
    scaled = (pixels / np.float32(255) - np.float32(mean)) / np.float32(std)
    inputs = torch.from_numpy(scaled.transpose(0, 3, 1, 2).astype(np.float32))
    for name, model in models().items():
        folder = FOLDER / name
        shaken(model).save_pretrained(folder)
        cut = {"size": {"shortest_edge": 8}, "do_center_crop": True, "crop_size": {"height": 6, "width": 6}}
        text = json.dumps(processor | sizes.get(name, cut), indent=1) + "\n"
        (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")
        with torch.no_grad():
            out = backbone(model)(pixel_values=inputs, output_hidden_states=True)
        vectors = out.pooler_output if name.startswith("clip") else out.last_hidden_state[:, 0]
        hidden = torch.stack([states[:, 0] for states in out.hidden_states], dim=1)
        golden = {"pixels": pixels, "vectors": vectors.numpy(), "hidden": hidden.contiguous().numpy()}
        save_file({key: np.ascontiguousarray(value) for key, value in golden.items()}, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
