"""Scores of a trained language model: perplexity here, the tasks of lm-evaluation-harness beside it.

Nothing in this package trains; `lrm_recall.train` calls it, never the other way round.
"""
