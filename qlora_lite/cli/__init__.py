"""The command line: one file for each command, with its name. Commands parse options and call the other rooms.

In reading order:

__main__       what the program runs first, before it imports the rest
main           the entry point: commands, errors, exit status
options        options that several commands share
data_options   options of the commands that read records, and the records of a run
data           shows what is learned from records
plan           predicts whether training fits into a memory
train          trains adapters on records
profile        measures the memory of two training steps
merge          merges an adapter into its base
quantize       writes a packed checkpoint
push           uploads an adapter or a checkpoint to the hub
inspect        shows an adapter on disk
env            shows versions and the machine
"""
