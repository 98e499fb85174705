"""The objective of training: the loss of a model, and whether the model can be trained with it.

All of it is found out before the first step. In reading order:

losses            three ways to compute the loss of a causal language model
token_statistics  log-probabilities and other figures of each token
task_losses       the losses of other tasks: classes, numbers, words, preferences
choice            which of them is right for a model and takes least memory
made_up_rows      rows of made-up tokens, on which a model is tried
causality         whether tokens see later ones
packing           whether packed examples see each other
positions         whether a model has a position for each token
scores            how good the answers to held-out examples are
gradients         whether every trained parameter gets a gradient
"""
