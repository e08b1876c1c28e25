"""LEMUR (arXiv 2511.10962): the loss reaches the encoders through the targets, past items come from a memory bank.

    python -m experiments lemur end-to-end.staged --dataset ../shared/data/ml1m --budget cpu

A contrast of the item before and the target (temperature .02, other targets of a session no negatives) joins the
generation loss; no history is encoded in a step, and a fifth of a step's items is encoded and differentiated (p = q =
.2, as deployed). The published system ranks candidates of a search by a click loss on industrial data (QAUC +.81%, with
p = q = .2 +.76%); here the generator recommends, with the stages of end_to_end.py. Not measured yet.
"""

from experiments.configs.end_to_end import variant, with_step
from experiments.experiment import Experiment
from quantizers import Schedule
from semid.joint import Objective


def config() -> Experiment:
    objective = Objective.only(generation=Schedule(1.0), contrast=Schedule(0.1))
    model = with_step(window=0, objective=objective, forward=0.2, backward=0.2)
    return variant("LEMUR", model, paper="arXiv 2511.10962")
