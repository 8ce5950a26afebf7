"""The six tasks of Mechanistic Architecture Design (MAD, Poli et al. 2024, arXiv 2403.17844): data and scoring.

    compression              write a random sequence into its last position, from which it is decoded
    in-context-recall        a key shown before: say the value that followed it
    noisy-in-context-recall  the same, with noise between the pairs
    fuzzy-in-context-recall  the same, keys and values being motifs of one to three tokens
    selective-copying        repeat the tokens of a sequence that are not blank, in their order
    memorization             say the value of a key; the pairs are fixed for all sequences, and never shown

`MADTask` names a task and its parameters, `mad_data` makes its training and its test set, `accuracy` scores
predictions, `benchmark` lists the settings that a MAD score averages over. The sequences are those of mad-lab
(github.com/athms/mad-lab at 0f49a45) for the same seed, bit for bit; where its code does not do what it says,
the targets are those that it means, and `MADTask.as_released` brings its own back:

    compression   the function marks noise positions as not scored, then returns the inputs as targets
    memorization  with noise, the facts are drawn over a vocabulary that includes the noise tokens
    fuzzy recall  in some sequences the final query's pair was never shown (its place is drawn beyond the last one
                  that a motif can start at); the query is scored all the same

What stands as it is in mad-lab, because every published number has it, is said in the task's own file. Not an
effect on data, but on what runs of its code mean: `train.py` takes its own defaults for the options instead of the
task's configuration (so its noisy recall has no noise); before December 2024 (bf7df27) `num_tokens_to_copy` did
not reach the generator, so all settings of it were 16; data made by several workers repeat themselves, as each
gets a copy of one generator; learning rates are compared on the test set, and settings that diverged (NaN) drop
out of the mean.
"""

from lrm_recall.tasks.mad.benchmark import LEARNING_RATES, WEIGHT_DECAYS, benchmark
from lrm_recall.tasks.mad.data import MADData, MADSplits, mad_data
from lrm_recall.tasks.mad.scoring import MADAccuracy, accuracy
from lrm_recall.tasks.mad.task import TASKS, MADTask

__all__ = ["LEARNING_RATES", "TASKS", "WEIGHT_DECAYS", "MADAccuracy", "MADData", "MADSplits", "MADTask", "accuracy",
           "benchmark", "mad_data"]
