"""Three code sequences of an item, of its text, its picture and its behavior, and which of them is generated (MSCGRec).

    python -m experiments mscgrec pictures item-graph --dataset ../shared/data/ml1m --budget cpu --seeds 0
    python -m experiments pictures.three-behavior --dataset ... --model.drop-sequences 0    # none is left out

    encoder           a small vision transformer from scratch, by contrast of consecutive items, whose vectors the
                      others read; its RQ-VAE and generator are hardly trained
    image             one sequence, of these vectors
    three-text        all three are read, that of the text is generated
    three-image       all three are read, that of the picture is generated
    three-behavior    all three are read, that of the behavior is generated, as in the paper

Where pictures are generated, films without a poster share their codes and differ in the last level alone. Where
pictures are read, these films have none, which is a learned row. `pictures.encoder --weights DIR` starts from a
pretrained encoder.

All else is as in `mscgrec`, which has the arms of one and of two sequences. Measured on MovieLens-1M at a third of the
epochs (Recall@10): behavior .2127, with text read too .2208, with pictures as well .2230 (three seeds); text .1470,
with behavior read too .1901, with pictures as well .1978; pictures .0942, with text and behavior read too .1712 (seed
0). The paper (arXiv 2602.03713) has codes of pictures by self-supervision (`semid.tokenizers.rq_dino_loss`, for
accelerators).
"""

from dataclasses import replace
from typing import Any

from experiments.configs.end_to_end import ENCODERS, training
from experiments.configs.mscgrec import BEHAVIOR, CPU, TEXT
from experiments.configs.mscgrec import config as without_pictures
from experiments.experiment import Experiment
from semid.encoders import ContentConfig
from semid.generators import GeneratorConfig
from semid.joint import JointConfig
from semid.tokenizers import RQKmeansConfig, RQVaeConfig, TokenizerConfig

_COLUMN = "pictures"
_IMAGE = TokenizerConfig(RQKmeansConfig(), columns=(_COLUMN,))


def config() -> dict[str, Experiment]:
    encoder = JointConfig(
        encoder=training(1, 256, 2e-3),
        tokenizer=RQVaeConfig(hidden=(256, 128)),
        generator=GeneratorConfig(training=training(0.5, 64, 3e-3)),
        joint=(),
        finetune=training(0.5, 64, 1e-3),
        tie_break=1024,  # films without a poster share their codes
    )
    arms = without_pictures()
    of_pictures: dict[str, Any] = {"columns": {_COLUMN: "pictures.encoder"}, "datasets": ("ml1m",)}
    names = {"text": "text", "image": "pictures", "behavior": "behavior"}
    codes = {"text": TEXT, "image": _IMAGE, "behavior": BEHAVIOR}

    def three(target: str) -> Experiment:
        others = [name for name in codes if name != target]
        title = f"codes of {names[target]}, {names[others[0]]} and {names[others[1]]} read too"
        sequences = {name: codes[name] for name in others}
        return replace(arms["behavior"], title=title, tokenizer=codes[target], sequences=sequences, **of_pictures)

    return {
        "encoder": Experiment(
            "encoder of pictures",
            encoder,
            encoders=ContentConfig(text=None, image=ENCODERS.image),
            cpu=CPU,
            datasets=("ml1m",),
        ),
        "image": replace(arms["text"], title="codes of pictures", tokenizer=_IMAGE, **of_pictures),
        **{f"three-{target}": three(target) for target in codes},
    }
