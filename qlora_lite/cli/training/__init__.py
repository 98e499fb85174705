"""A training run of the command line: its options, settings, records and figures.

In reading order:

run_options     the options of a run that only `train` has
run_settings    LoraConfig and TrainConfig of the options
first_adapter   the adapter that a run goes on from, and options that contradict it
task_records    what the records of a task are, their labels, and their batches
run_figures     what is told at the end
report          the command that draws what runs left in their folders
"""
