"""The records of a training run, by the task of its model.

task_records    what the records of a task are, their labels and batches, and scores of those held out
"""
