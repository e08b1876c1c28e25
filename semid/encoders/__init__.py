"""Encoders of text, images and ready-made vectors; fusion, adapters, pretrained weights."""

from semid.encoders.adapters import Frozen, Full, LowRank, SideAdapters, SideTower, Tuning, cached_states, tuned
from semid.encoders.blocks import T5, Architecture, BlocksConfig, LayerScale, PostNorm, PreNorm
from semid.encoders.content import FeatureRows, HiddenRows, ImageRows, Rows, TextRows, present_of, row_digests, take
from semid.encoders.content_encoders import (
    ContentEncoderConfig,
    FittedEncoder,
    restore_encoders,
    with_content_vectors,
)
from semid.encoders.fusion import Content, FeatureEncoder, FusionConfig, ItemEncoder, check_content
from semid.encoders.image import ImageConfig, ImageEncoder, image_rows, load_image_encoder
from semid.encoders.pretrained import PretrainedEncoder, PretrainedVectorsConfig
from semid.encoders.reader import (
    ContentConfig,
    ContentReader,
    ImageFromScratch,
    ImageSource,
    ItemContent,
    PretrainedImage,
    PretrainedText,
    TextFromScratch,
    TextSource,
    read_content,
)
from semid.encoders.text import LatentSemantics, LatentSemanticsConfig, with_text_vectors
from semid.encoders.transformer import Pooling, TextEncoder, TextEncoderConfig, load_text_encoder
from semid.encoders.vocabulary import PretrainedTokenizer, Vocabulary

__all__ = [
    "T5",
    "Architecture",
    "BlocksConfig",
    "Content",
    "ContentConfig",
    "ContentEncoderConfig",
    "ContentReader",
    "FeatureEncoder",
    "FeatureRows",
    "FittedEncoder",
    "Frozen",
    "Full",
    "FusionConfig",
    "HiddenRows",
    "ImageConfig",
    "ImageEncoder",
    "ImageFromScratch",
    "ImageRows",
    "ImageSource",
    "ItemContent",
    "ItemEncoder",
    "LatentSemantics",
    "LatentSemanticsConfig",
    "LayerScale",
    "LowRank",
    "Pooling",
    "PostNorm",
    "PreNorm",
    "PretrainedEncoder",
    "PretrainedImage",
    "PretrainedText",
    "PretrainedTokenizer",
    "PretrainedVectorsConfig",
    "Rows",
    "SideAdapters",
    "SideTower",
    "TextEncoder",
    "TextEncoderConfig",
    "TextFromScratch",
    "TextRows",
    "TextSource",
    "Tuning",
    "Vocabulary",
    "cached_states",
    "check_content",
    "image_rows",
    "load_image_encoder",
    "load_text_encoder",
    "present_of",
    "read_content",
    "restore_encoders",
    "row_digests",
    "take",
    "tuned",
    "with_content_vectors",
    "with_text_vectors",
]
