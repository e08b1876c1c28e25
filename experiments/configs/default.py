"""The defaults of `semid tokenize` and `semid train`: RQ-VAE codes, RQ-Transformer over codes and content.

python -m experiments default --dataset ../shared/data/amazon14_beauty
"""

from experiments.experiment import Experiment
from semid.generators import GeneratorConfig
from semid.tokenizers import TokenizerConfig


def config() -> Experiment:
    paper = "RQ-Transformer: Lee et al., CVPR 2022"
    return Experiment("semid, defaults", GeneratorConfig(), TokenizerConfig(), paper=paper)
