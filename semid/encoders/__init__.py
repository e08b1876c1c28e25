"""Encoders of text, images and ready-made vectors; fusion, adapters, pretrained weights."""

from semid.encoders.adapters import (
    Frozen,
    Full,
    LowRank,
    SideAdapters,
    SideTower,
    Tuning,
    cached_states,
    tuned,
)
from semid.encoders.blocks import (
    T5,
    Architecture,
    BlocksConfig,
    LayerScale,
    PostNorm,
    PreNorm,
)
from semid.encoders.content import (
    FeatureRows,
    HiddenRows,
    ImageRows,
    Rows,
    TextRows,
    take,
)
from semid.encoders.fusion import (
    Content,
    FeatureEncoder,
    FusionConfig,
    ItemEncoder,
    check_content,
)
from semid.encoders.image import (
    ImageConfig,
    ImageEncoder,
    image_rows,
    load_image_encoder,
)
from semid.encoders.text import (
    with_text_vectors,
)
from semid.encoders.transformer import (
    Pooling,
    TextEncoder,
    TextEncoderConfig,
    load_text_encoder,
)
from semid.encoders.vocabulary import (
    PretrainedTokenizer,
    Vocabulary,
)

__all__ = [
    "T5",
    "Architecture",
    "BlocksConfig",
    "Content",
    "FeatureEncoder",
    "FeatureRows",
    "Frozen",
    "Full",
    "FusionConfig",
    "HiddenRows",
    "ImageConfig",
    "ImageEncoder",
    "ImageRows",
    "ItemEncoder",
    "LayerScale",
    "LowRank",
    "Pooling",
    "PostNorm",
    "PreNorm",
    "PretrainedTokenizer",
    "Rows",
    "SideAdapters",
    "SideTower",
    "TextEncoder",
    "TextEncoderConfig",
    "TextRows",
    "Tuning",
    "Vocabulary",
    "cached_states",
    "check_content",
    "image_rows",
    "load_image_encoder",
    "load_text_encoder",
    "take",
    "tuned",
    "with_text_vectors",
]
