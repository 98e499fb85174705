"""The command line: a file a command, named as the command. It parses options and calls the other rooms.

In reading order:

main       the commands, errors as one line, exit status
options    options that several commands share
plan       what fits into a memory
train      adapters on a data file
profile    the memory of some steps
merge      an adapter merged into its base
quantize   a packed checkpoint
inspect    an adapter on disk
env        versions and machine
"""
