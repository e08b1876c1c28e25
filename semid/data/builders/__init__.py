"""TFDS builders of public datasets, and functions that read them as a `Dataset`. TensorFlow is not needed."""

from semid.data.builders.amazon_reviews import read_amazon_reviews
from semid.data.builders.movielens import read_movielens
from semid.data.builders.tencentgr import read_tencentgr

__all__ = ["read_amazon_reviews", "read_movielens", "read_tencentgr"]
