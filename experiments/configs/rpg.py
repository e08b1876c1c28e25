"""RPG (KDD 2025, arXiv 2506.05781): many unordered product codes of an item, predicted at once by parallel heads.

    python -m experiments rpg --dataset ../shared/data/amazon14_beauty                  # the full schedule: a GPU
    python -m experiments rpg --dataset ../shared/data/amazon14_beauty --budget cpu     # 6 of 150 epochs

As published: optimized product quantization, an item as the mean of its codes' embeddings, residual heads whose
matrices are zero at first, cosines at temperature .03, one cross-entropy per code, the mean of whose logarithms ranks
items (their sum here); two layers of width 448, dropout .5, batches of 2,000 targets, 150 epochs, the rate of 16 codes.
Ours: the width of the text vectors (the paper quantizes 3,072 dimensions, on Beauty by 32 codes), SwiGLU and rotary
positions for GPT-2's, the history left out. Decoding is no walk over a graph of items: 500 beams go through the trie,
exact where the catalogue is smaller; `beam` in results.json compares them with exact scores. Published on Beauty:
Recall@10 .0809, NDCG@10 .0464; at item level, tuned by cornac, .0789 / .0454. Not measured yet.
"""

from experiments.experiment import Experiment
from semid.generators import GeneratorConfig
from semid.tokenizers import ProductConfig, TokenizerConfig
from semid.training import OptimizerConfig, TrainingConfig
from seq_models import ParallelHeadsConfig, TransformerConfig


def config() -> Experiment:
    backbone = TransformerConfig(dim=448, layers=2, heads=4, hidden=1024, dropout=0.5)
    training = TrainingConfig(150, 64, 4, OptimizerConfig(learning_rate=3e-3), validate_every=2, patience=10)
    return Experiment(
        "RPG",
        GeneratorConfig(ParallelHeadsConfig(backbone), features=(), training=training, validation_beam=500),
        TokenizerConfig(ProductConfig(level_sizes=(256,) * 16)),
        beam_size=500,
        cpu=6 / 150,
        paper="KDD 2025, arXiv 2506.05781",
        expected="R@10 .0789-.0809, N@10 .0454-.0464 (published)",
    )
